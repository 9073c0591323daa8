"""What several tests of e2e/, world/ and soak/ use. It needs no package, except in vectors_of,
because some suites of world/ have none.

QEMB_BIN names the program (default ./qemb), for example one with sanitizers, whose reports show as
a wrong exit status."""
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QEMB = os.path.abspath(os.environ.get("QEMB_BIN", ROOT / "qemb"))
SMALL = str(ROOT / "tests/fixtures/small.qemb")
GUARD = 60  # seconds after which a test counts as hung; no test measures time


def is_sanitized(program):
    """Whether it was built with the address or the thread sanitizer."""
    binary = Path(program).read_bytes() if os.path.exists(program) else b""
    return b"__asan_init" in binary or b"__tsan_init" in binary


def run(*args, **kwargs):
    """Returns what a program writes on standard output; its failure shows what it said. The limit
    suits an installation from the network."""
    p = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=600,
                       check=False, **kwargs)
    assert p.returncode == 0, f"{args}: {p.stdout[-4000:]}{p.stderr[-4000:]}"
    return p.stdout


def make(*args):
    return run("make", "-s", *args, cwd=ROOT)


REDIS = shutil.which("redis-check-rdb")  # None: not installed


def redis_server(*options, **popen):
    """Starts a Redis. Debian's redis-tools has the whole program; the name that it is called by
    decides what it does. The package redis-server would add a daemon that starts at once."""
    return subprocess.Popen(["redis-server", *map(str, options)], executable=REDIS, **popen)


def stdout_of(p, status=0, errors=None):
    """stdout of a finished process. It must have that status; stderr must be empty or match
    errors."""
    message = p.stderr.decode()
    assert p.returncode == status, message
    assert message == "" if errors is None else re.search(errors, message), message
    return p.stdout


def read_line(p):
    """A line of p's stdout, which has no buffer; the guard kills p if none comes."""
    guard = threading.Timer(GUARD, p.kill)
    guard.start()
    line = b""
    while not line.endswith(b"\n"):
        c = p.stdout.read(65536 if not line else 1)
        assert c, "no answer"
        line += c
    guard.cancel()
    return line


def wait_for(condition, limit=GUARD, pause=0.002):
    """Asks again after each pause; both in seconds."""
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until
        time.sleep(pause)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def jsonl(*records):
    """Lines of JSON; str and bytes are lines already."""
    lines = (r if isinstance(r, (str, bytes)) else json.dumps(r) for r in records)
    return b"".join((l if isinstance(l, bytes) else l.encode()) + b"\n" for l in lines)


def vectors_of(texts, *options, model):
    """The program's own: float32 (n, dim)."""
    import numpy as np  # not every suite has it

    p = subprocess.run([QEMB, "-m", model, "--input", "jsonl", "--output", "f32", *options],
                       input=jsonl(*({"text": t} for t in texts)), capture_output=True, timeout=600)
    numbers = np.frombuffer(stdout_of(p), "<f4")
    return numbers.reshape(len(texts), len(numbers) // (len(texts) or 1))


def change_weights(model, to, layer=0):
    """Writes a model of the same shape and size with other vectors: a matrix of the layer has its
    signs turned. What the header records of the contents is right."""
    from edit_qemb import Qemb  # a folder that only e2e/ and world/ have in their path

    f = Qemb(model)
    matrix = f.sections[f"layers.{layer}.wdown"]
    matrix[4] = bytes(b ^ 0x80 if i % 2 else b for i, b in enumerate(matrix[4]))
    return f.write(to)


def write_over(path, data, at=0):
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(data)


def tables():
    """The names of this machine's tables, as the program lists them."""
    p = subprocess.run([QEMB, "-m", SMALL, "--cpu", "abacus"], input=b"", capture_output=True)
    return re.search(r"want (.*)\)", p.stderr.decode())[1].split(", ")


def options_of(prefix, program):
    """What --help of an installed program lists."""
    text = run(prefix / "bin" / program, "--help")
    return set(re.findall(r"^  (?:-., )?(--[a-z-]+)", text, re.M)) | {"--help", "--version"}
