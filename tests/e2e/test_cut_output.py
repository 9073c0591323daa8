"""Outputs that end early: on a full disk or at a limit of the file's size, and by a signal."""
import fcntl
import json
import re
import resource
import signal
import struct
import subprocess
import termios

import numpy as np
import pytest
from helpers import GUARD, QEMB, ROOT, SMALL, read_line, stdout_of, wait_for

RERANKER = str(ROOT / "tests/fixtures/reranker.qemb")
F_GETPIPE_SZ = 1032  # of Linux; a pipe's size in bytes
TEXTS = b"".join(b"text number %d\n" % i for i in range(400))
DIM, LIMIT = 64, 20000  # bytes of the file: in no row's end, and far from the output's


def limited(path, *args, model=SMALL, data=TEXTS):
    """Runs qemb into a file that may not grow over LIMIT. Returns (rows, bytes) of its message."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    with open(path, "wb") as f:
        p = subprocess.run([QEMB, *args, "-m", model], input=data, stdout=f, stderr=subprocess.PIPE,
                           timeout=GUARD, preexec_fn=limit)
    assert p.returncode == 4, p.stderr
    said = re.fullmatch(rb"qemb: standard output: cannot write \(File too large\); (\d+) rows are "
                        rb"whole, the first (\d+) bytes\n", p.stderr)
    assert said and path.stat().st_size == LIMIT, p.stderr
    return int(said[1]), int(said[2])


@pytest.mark.parametrize("kind", ["json", "jsonl", "tsv", "base64"])
def test_whole_lines(kind, tmp_path):
    args = ("--dim", str(DIM), "--output", kind)
    rows, n = limited(tmp_path / "cut", *args)
    want = stdout_of(subprocess.run([QEMB, "-m", SMALL, *args], input=TEXTS, capture_output=True,
                                    timeout=GUARD))
    cut = (tmp_path / "cut").read_bytes()
    assert cut == want[:LIMIT], "what is written is not damaged"
    assert cut[:n] == b"".join(want.splitlines(True)[:rows])
    assert b"\n" not in cut[n:] and 0 < n < LIMIT


@pytest.mark.parametrize("kind,row,header", [("f32", 4 * DIM, 0), ("npy", 4 * DIM, 128),
                                             ("f16", 2 * DIM, 0), ("int8", DIM, 0)])
def test_whole_vectors(kind, row, header, tmp_path):
    data = TEXTS * 2 if kind == "int8" else TEXTS
    rows, n = limited(tmp_path / "cut", "--dim", str(DIM), "--output", kind, data=data)
    assert rows == (LIMIT - header) // row and n == header + rows * row
    want = np.frombuffer(stdout_of(subprocess.run(
        [QEMB, "-m", SMALL, "--dim", str(DIM), "--output", kind.replace("npy", "f32")], input=data,
        capture_output=True, timeout=GUARD)), "u1")
    cut = np.fromfile(tmp_path / "cut", "u1")
    assert (cut[header:n] == want[:n - header]).all()


def test_other_commands(tmp_path):
    lines = b"".join(b'{"query":"%d","documents":["a","b"]}\n' % i for i in range(300))
    for args, model, data in ((("tokenize",), SMALL, TEXTS * 4), (("rerank",), RERANKER, lines),
                              (("rerank", "--query", "a", "-0"), RERANKER,
                               TEXTS.replace(b"\n", b"\0") * 3)):
        rows, n = limited(tmp_path / "cut", *args, model=model, data=data)
        cut = (tmp_path / "cut").read_bytes()
        end = b"\0" if "-0" in args else b"\n"
        assert cut[n - 1:n] == end and cut.count(end) == rows and end not in cut[n:]


def test_a_full_disk():
    for kind in ("json", "f32", "npy"):
        with open("/dev/full", "wb") as full:
            p = subprocess.run([QEMB, "-m", SMALL, "--output", kind], input=b"a\n", stdout=full,
                               stderr=subprocess.PIPE, timeout=GUARD)
        assert p.returncode == 4 and b"No space left on device); 0 rows are whole" in p.stderr


def test_a_spool_at_its_limit():
    """Vectors of .npy for a pipe go to a temporary file first: the pipe then gets nothing."""
    p = subprocess.run([QEMB, "-m", SMALL, "--output", "npy"], input=TEXTS, capture_output=True,
                       timeout=GUARD, preexec_fn=lambda: resource.setrlimit(
                           resource.RLIMIT_FSIZE, (LIMIT, LIMIT)))
    assert (p.returncode, p.stdout) == (4, b"")
    assert p.stderr == b"qemb: temporary file: cannot write (File too large)\n"


# ---- signals -----------------------------------------------------------------------------------

@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_tokenize_ends_between_records(sig):
    p = subprocess.Popen([QEMB, "tokenize", "-m", SMALL], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    p.stdin.write(b"one\ntwo")
    assert json.loads(read_line(p))
    p.send_signal(sig)
    assert p.wait(GUARD) == -sig and p.stdout.read() == b"" and p.stderr.read() == b""


def test_tokenize_ends_no_record_in_the_middle():
    """The signal comes while the reader of the output has stopped in the middle of a record."""
    p = subprocess.Popen([QEMB, "tokenize", "-m", SMALL, "--max-tokens", "2048", "--input",
                          "jsonl"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    line = json.dumps({"ids": [2000] * 2000}).encode() + b"\n"
    p.stdin.write(line * 16)  # an output of 160 kB, more than a pipe holds
    wait_for(lambda: unread(p.stdout) > fcntl.fcntl(p.stdout, F_GETPIPE_SZ) - 4096)
    p.send_signal(signal.SIGTERM)
    got = p.stdout.read()
    assert p.wait(GUARD) == -signal.SIGTERM
    assert got.endswith(b"]\n") and all(len(json.loads(x)) == 2001 for x in got.splitlines())


def unread(pipe):
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0]


def test_tokenize_and_a_closed_pipe():
    p = subprocess.Popen([QEMB, "tokenize", "-m", SMALL], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    p.stdout.close()
    p.stdin.write(b"one\n")
    assert p.wait(GUARD) == 4 and p.stderr.read() == b""
