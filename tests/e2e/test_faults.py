"""Every program and the library while one of its calls fails: memory, maps, threads, files.

fail_nth.c is preloaded and counts the calls. A run without a fault says how many there are; each of
them is a point. A point is a run, or a request, in which that call fails. It must end in the same
output as without, or in a documented status with a message: no crash, no hang, nothing lost in
silence. FAULTS=all takes all points (`make faults`), else each suite takes a share of them.

QEMB_BIN and QEMB_SERVE_BIN name the programs, for example those with sanitizers."""

import contextlib
import gzip
import http.client
import json
import mmap
import os
import re
import resource
import shutil
import struct
import subprocess

import pytest
from helpers import GUARD, QEMB, ROOT, SMALL, is_sanitized, run, wait_for

SERVE = os.path.abspath(os.environ.get("QEMB_SERVE_BIN", ROOT / "qemb-serve"))
CUDA = ROOT / "build/emu/qemb-cuda"  # the emulated GPU; make faults builds it
RERANKER = str(ROOT / "tests/fixtures/reranker.qemb")
ALL = os.environ.get("FAULTS") == "all"
MEMORY, MAP, THREAD, FILES = 1, 2, 4, 8
TEXTS = b"a line\nanother one\n"
OBJECTS = b'{"id": 1, "text": "a", "x": [1, {"y": 2}]}\n{"id": "b", "text": "c"}\n'


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("preload") / "fail_nth.so"
    run("gcc", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror",
        ROOT / "tests/e2e/fail_nth.c", "-o", path, "-ldl")
    return path


class Faults:
    """The counters of one preloaded process; see fail_nth.c."""

    def __init__(self, library, path, kinds=MEMORY | MAP | THREAD | FILES):
        path.write_bytes(bytes(24))
        with open(path, "r+b") as f:
            self.map = mmap.mmap(f.fileno(), 24)
        sanitizers = "verify_asan_link_order=0:detect_leaks=0:allocator_may_return_null=1"
        self.env = os.environ | {"LD_PRELOAD": str(library), "FAIL_NTH": str(path),
                                 "FAIL_KINDS": str(kinds), "ASAN_OPTIONS": sanitizers}

    @property
    def calls(self):
        return struct.unpack_from("<Q", self.map)[0]

    def fail(self, first, n=1):
        """Counts from 0 again; the calls first .. first+n-1 fail. first 0: none."""
        self.map[8:24] = bytes(16)
        self.map[0:8] = bytes(8)
        self.map[8:24] = struct.pack("<QQ", first, n)


def points(calls, share):
    """The calls of which each fails in a run of its own: one in `share`, and the last one."""
    return range(1, calls + 1) if ALL else sorted({*range(1, calls + 1, share), calls})


def report(name, n, outcomes):
    print(f"{name}: {n} points, statuses {dict(sorted(outcomes.items()))}")


def sane(status, said):
    """Nothing that a sanitizer, libc or the kernel says."""
    assert status >= 0 and b"Sanitizer" not in said and b"runtime error" not in said, said.decode()
    assert not re.search(rb"free\(\)|malloc\(\)|corrupt|Assertion|assertion", said), said.decode()


# ---- the programs ------------------------------------------------------------------------------

LINES = "lines.txt"
CASES = {  # arguments, standard input, and of how many points `make test` takes one
    "embed": (("-m", SMALL), TEXTS, 12),
    "three_threads": (("-m", SMALL, "--threads", 3), TEXTS, 12),
    "no_normal_file": (("-m", SMALL), gzip.compress(TEXTS), 20),
    "json": (("-m", SMALL, "--input", "jsonl", "--output", "jsonl", "--keep"), OBJECTS, 12),
    "query": (("-m", SMALL, "--query"), TEXTS, 20),
    "tokenize": (("tokenize", "-m", SMALL), TEXTS, 6),
    "info": (("info", "--verify", SMALL), b"", 6),
    "plan": (("plan", "-m", SMALL), b"", 60),
    "check": (("check", "-m", ROOT / "examples/demo.qemb"), b"", 20),
    "grep": (("grep", "-m", SMALL, "-k", 2, "line", LINES), b"", 12),
    "index": (("grep", "-m", SMALL, "-k", 2, "--index", "out/x.qidx", "line", LINES), b"", 12),
    "rerank": (("rerank", "-m", RERANKER, "--query", "q"), TEXTS, 12),
    "shards": (("shards", "-m", SMALL, "--output", "f32", "--out", "out", LINES), b"", 16),
}
TABLES = ("plain", "avx2", "avx2-int16", "avx2-int8", "avx512", "avx512-int8", "amx")


def tables():
    """The tables of these names that this CPU has."""
    return [t for t in TABLES if subprocess.run([QEMB, "info", SMALL, "--cpu", t, *math_of(t)],
                                                capture_output=True, check=False).returncode == 0]


def math_of(table):
    return ("--math", table.split("-")[1]) if "-" in table else ()


def check_end(p, good):
    """A run with a fault, beside the one without."""
    sane(p.returncode, p.stderr)
    # 86: the emulator of a GPU, has no memory for itself.
    if p.returncode == 86 and b"emu" in p.stderr:
        return
    lines = p.stderr.decode().splitlines()
    assert all(line.startswith("qemb: ") for line in lines), lines
    if p.returncode == good.returncode:
        assert (p.stdout, p.stderr) == (good.stdout, good.stderr)
        return
    # 1: standard input, or a file of grep and shards, could not be read. 3: records, which say it
    # themselves where they are JSON (the last line counts them, except of tokenize).
    assert p.returncode in (1, 2, 3, 4), (p.returncode, lines)
    if p.returncode == 1:
        assert any("cannot read" in line for line in lines), lines
    assert lines or b'"code":"out_of_memory"' in p.stdout
    assert len(lines) <= 2, lines


def sweep(program, name, library, folder, args, data, share):
    faults, outcomes = Faults(library, folder / "control"), {}

    def once(first):
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()
        faults.fail(first)
        return subprocess.run([program, *map(str, args)], input=data, capture_output=True,
                              timeout=GUARD, env=faults.env, cwd=folder, check=False)

    (folder / LINES).write_bytes(b"first line\nsecond one\nthird\n")
    good = once(0)
    assert good.returncode == 0, good.stderr
    some = points(faults.calls, share)
    for i in some:
        p = once(i)
        check_end(p, good)
        outcomes[p.returncode] = outcomes.get(p.returncode, 0) + 1
    assert outcomes.get(2), "no point at which the model cannot be used"
    report(name, len(some), outcomes)


@pytest.mark.parametrize("name", CASES)
def test_a_call_of_the_program_fails(library, tmp_path, name):
    sweep(QEMB, name, library, tmp_path, *CASES[name])


@pytest.mark.parametrize("table", tables())
def test_a_call_fails_with_each_table(library, tmp_path, table):
    args = ("-m", SMALL, "--cpu", table, *math_of(table), "--threads", 3)
    sweep(QEMB, table, library, tmp_path, args, TEXTS, 12)


@pytest.mark.skipif(not (ALL and CUDA.exists()), reason="make faults, with the CUDA toolkit")
def test_a_call_of_the_emulated_cuda_program_fails(library, tmp_path):
    sweep(CUDA, "cuda", library, tmp_path, ("-m", SMALL, "--no-graphs"), TEXTS, 1)


@pytest.mark.skipif(is_sanitized(QEMB), reason="a sanitizer maps more than the limit")
def test_helper_threads_that_cannot_start():
    """As by ulimit -v: 1,024 stacks do not fit."""
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2_000_000_000, 2_000_000_000))

    for table in tables():
        command = [QEMB, "-m", SMALL, "--cpu", table, *math_of(table), "--threads", "1024"]
        p = subprocess.run(command, input=TEXTS, capture_output=True, timeout=GUARD,
                           preexec_fn=limit, check=False)
        assert p.returncode == 2 and p.stdout == b"", p.stderr
        assert re.fullmatch(rb"qemb: threads: cannot start them \(got \d+, want 1024; .*\)\n",
                            p.stderr), p.stderr


def test_openmp_settings_bind_no_thread(tmp_path):
    """Helper threads run on all CPUs that the process may use."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU")
    env = os.environ | {"OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "1", "GOMP_CPU_AFFINITY": "0"}
    for table in tables():
        p = subprocess.Popen([QEMB, "-m", SMALL, "--cpu", table, *math_of(table), "--threads", "3"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        p.stdin.write(b"a\n")
        p.stdin.flush()
        p.stdout.readline()
        for thread in os.listdir(f"/proc/{p.pid}/task"):
            assert os.sched_getaffinity(int(thread)) == os.sched_getaffinity(0)
        p.communicate(timeout=GUARD)
        assert p.returncode == 0


# ---- the library -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embed(tmp_path_factory):
    """examples/embed.c over libqemb.so."""
    so = ROOT / "build/lib/libqemb.so"
    if not so.exists():
        pytest.skip("no build/lib/libqemb.so")
    folder = tmp_path_factory.mktemp("embed")
    (folder / "libqemb.so.0").symlink_to(so)
    run("gcc", f"-I{ROOT}", ROOT / "examples/embed.c", folder / "libqemb.so.0", "-o",
        folder / "embed", f"-Wl,-rpath,{folder}")
    return folder / "embed"


def test_a_call_of_the_library_fails(library, embed, tmp_path):
    """It returns an error; the program, examples/embed.c, then ends with status 1."""
    faults, outcomes = Faults(library, tmp_path / "control"), {}
    command = [embed, SMALL, "a query", "a document", "another"]
    once = lambda: subprocess.run(command, capture_output=True, timeout=GUARD, env=faults.env,
                                  check=False)
    good = once()
    some = points(faults.calls, 4)
    for i in some:
        faults.fail(i)
        p = once()
        sane(p.returncode, p.stderr)
        if p.returncode == 0:
            assert p.stdout == good.stdout and p.stderr == b""
        else:
            assert p.returncode == 1
            assert re.fullmatch(rb"embed: [^\n]+\n", p.stderr), p.stderr
        outcomes[p.returncode] = outcomes.get(p.returncode, 0) + 1
    assert good.returncode == 0 and outcomes[1]
    report("library", len(some), outcomes)


# ---- the server --------------------------------------------------------------------------------


class Server:
    """qemb-serve with faults; its log is read at the end."""

    def __init__(self, faults, log):
        self.faults, self.log = faults, log
        with open(log, "wb") as f:
            self.process = subprocess.Popen(
                [SERVE, "-m", SMALL, "--port", "0", "--threads", "2", "--cache", "1"], stderr=f,
                env=faults.env)

    def events(self):
        lines = self.log.read_bytes().splitlines()
        return {e["event"]: e for e in map(json.loads, [l for l in lines if l.startswith(b"{")])}

    def ready(self):
        """Waits until it is ready, or has ended. Returns whether it is ready."""
        wait_for(lambda: self.process.poll() is not None or "ready" in self.events())
        return self.process.poll() is None

    def ask(self, texts):
        """The status and the object, or None if the connection ended without an answer."""
        c = http.client.HTTPConnection("127.0.0.1", self.events()["listening"]["port"],
                                       timeout=GUARD)
        body = json.dumps({"model": "small", "input": texts, "dimensions": 4})
        try:
            c.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            a = c.getresponse()
            return a.status, json.loads(a.read())
        except (http.client.RemoteDisconnected, http.client.IncompleteRead, ConnectionError):
            return None
        finally:
            c.close()

    def stop(self):
        self.process.terminate()
        return self.process.wait(GUARD)

    def said(self):
        return self.log.read_bytes()


@contextlib.contextmanager
def server(*args):
    s = Server(*args)
    try:
        yield s
    finally:
        if s.process.poll() is None:
            s.process.kill()
            s.process.wait()


def test_the_server_verifies_before_it_listens(tmp_path):
    """A flipped bit of a matrix, which has no checksum of its own."""
    model = bytearray((ROOT / "tests/fixtures/small.qemb").read_bytes())
    model[int.from_bytes(model[4096 + 96 * 4 + 72 :][:8], "little")] ^= 1  # tok_emb
    path = tmp_path / "bad.qemb"
    path.write_bytes(model)
    p = subprocess.run([SERVE, "-m", path, "--port", "0", "--verify"], capture_output=True,
                       timeout=GUARD, check=False)
    assert p.returncode == 2 and b"SHA-256: not what its writer recorded" in p.stderr
    assert b"listening" not in p.stderr


def test_a_call_of_a_starting_server_fails(library, tmp_path):
    """It ends with status 2 (1: it cannot listen) and a message, or serves."""
    faults, outcomes = Faults(library, tmp_path / "control"), {}
    with server(faults, tmp_path / "log") as s:
        assert s.ready()
        calls = faults.calls
        assert s.stop() == 0
    some = points(calls, max(calls // 12, 1))
    for i in some:
        faults.fail(i)
        with server(faults, tmp_path / "log") as s:
            if s.ready():
                faults.fail(0)
                assert s.ask(["a"])[0] == 200
                status = s.stop()
                assert status == 0, (i, s.said())
            else:
                status = s.process.wait()
                assert status in (1, 2), (i, status, s.said())
                assert s.said().strip(), i
            sane(status, s.said())
        outcomes[status] = outcomes.get(status, 0) + 1
    report("server start", len(some), outcomes)


def test_a_call_in_a_request_fails(library, tmp_path):
    """That request fails, with 503 and JSON, or its connection ends; the next one is answered, and
    the server stops as it should. Memory alone: a server without descriptors is another matter."""
    faults, outcomes = Faults(library, tmp_path / "control", MEMORY | MAP), {}
    with server(faults, tmp_path / "log") as s:
        assert s.ready()
        good = s.ask(["warm"])
        faults.fail(0)
        assert good[0] == 200 and s.ask(["the text", "another 0"])[0] == 200
        calls = faults.calls
        assert calls
        some = points(calls + 10, 1 if ALL else 3)  # the answer's end may still be counted
        want = None
        for i in some:
            faults.fail(0)
            want = s.ask(["the text", f"another {i}"])  # also computed, without the cache
            faults.fail(i)
            got = s.ask(["the text", f"once more {i}"])
            faults.fail(0)
            outcome = got[0] if got else "closed"
            if got and got[0] == 200:
                assert got[1]["data"][0] == want[1]["data"][0]
            elif got:
                assert got[0] == 503 and set(got[1]["error"]) >= {"message", "code"}, got
            outcomes[str(outcome)] = outcomes.get(str(outcome), 0) + 1
            assert s.process.poll() is None, s.said()
            again = s.ask(["the text", "another 0"])
            assert again and again[0] == 200 and again[1]["data"][0] == want[1]["data"][0]
        status = s.stop()
        sane(status, s.said())
        assert status == 0
    report("requests", len(some), outcomes)
