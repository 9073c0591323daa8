"""What all tests of e2e/ and world/ have: how processes start, and an installed qemb."""
import signal

import pytest
from helpers import make

# A background job may ignore SIGINT and SIGQUIT, and nohup makes it ignore SIGHUP. Every program
# that is started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The PREFIX of a `make install`."""
    prefix = tmp_path_factory.mktemp("prefix")
    make("install", f"PREFIX={prefix}")
    return prefix
