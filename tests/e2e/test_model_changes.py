"""A model file that is written over, truncated or replaced while ./qemb computes, and the signals
that end a run. test_serve_reload.py has the server's part."""
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from helpers import QEMB, SMALL, change_weights, is_sanitized, read_line, write_over

GUARD = 240 if is_sanitized(QEMB) else 60


@pytest.fixture
def model(tmp_path):
    """A copy whose time of modification is long past: two changes within a tick of the file
    system's clock look alike."""
    path = tmp_path / "model.qemb"
    shutil.copy(SMALL, path)
    os.utime(path, (10**9, 10**9))
    return path


def start(model, *args):
    return subprocess.Popen([QEMB, *args, "-m", model], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


def test_a_run_ends_when_the_file_is_written_over(model, tmp_path):
    other = Path(change_weights(SMALL, tmp_path / "other.qemb"))
    p = start(model)
    p.stdin.write(b"two\n")
    assert read_line(p).startswith(b"[")
    write_over(model, other.read_bytes())
    out, err = p.communicate(b"two\nthree\n", timeout=GUARD)
    assert p.returncode == 2 and out == b""
    assert err.decode().startswith(f"qemb: {model}: written to while it is in use (got ")
    assert err.count(b"\n") == 1


def test_a_truncated_file_ends_a_run_with_a_line(model):
    p = start(model)
    p.stdin.write(b"two\n")
    read_line(p)
    os.truncate(model, 4096)
    out, err = p.communicate(b"two\n", timeout=GUARD)
    assert p.returncode == 2 and out == b""
    assert err.decode() == (f"qemb: {model}: cannot be read: truncated while it was in use, or its "
                            "disk fails\n")


def test_a_file_that_is_replaced_stays_in_use(model, tmp_path):
    other = change_weights(SMALL, tmp_path / "other.qemb")
    p = start(model)
    p.stdin.write(b"two\n")
    first = read_line(p)
    os.rename(other, model)
    out, err = p.communicate(b"two\n", timeout=GUARD)
    assert (p.returncode, out, err) == (0, first, b"")
    again = subprocess.run([QEMB, "-m", model], input=b"two\n", capture_output=True, timeout=GUARD)
    assert again.returncode == 0 and again.stdout not in (b"", first)


def test_rerank_ends_too(tmp_path):
    model = tmp_path / "model.qemb"
    shutil.copy(Path(SMALL).parents[1] / "golden/reranker.qemb", model)
    os.utime(model, (10**9, 10**9))
    p = start(model, "rerank")
    p.stdin.write(b'{"query":"a","documents":["b"]}\n')
    read_line(p)
    write_over(model, b"\x01", model.stat().st_size - 1)
    out, err = p.communicate(b'{"query":"a","documents":["b"]}\n', timeout=GUARD)
    assert p.returncode == 2 and out == b"" and err.count(b"written to while it is in use") == 1


@pytest.mark.parametrize("sig", [signal.SIGHUP, signal.SIGQUIT])
def test_these_signals_end_the_input_as_sigterm_does(sig):
    p = start(SMALL)
    p.stdin.write(b"two\n" * 3)
    lines = [read_line(p)]
    p.send_signal(sig)
    out, err = p.communicate(timeout=GUARD)
    assert p.returncode == -sig and err == b""
    assert out in (lines[0] * 2, lines[0], b"")  # what was taken into a batch, whole
