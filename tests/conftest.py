"""What all tests of e2e/ and world/ have: how processes start, and an installed qemb."""
import signal

import pytest
from helpers import make

# A background job may start with SIGINT ignored, which every program started here would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The PREFIX of a `make install`."""
    prefix = tmp_path_factory.mktemp("prefix")
    make("install", f"PREFIX={prefix}")
    return prefix
