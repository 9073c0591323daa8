"""`qemb grep`, run as a user does. Texts and queries need no meaning: a score has to be that of the
vectors that `qemb` prints.

QEMB_BIN names the program, as in test_protocol.py.
"""

import gzip
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import zstandard
from helpers import GUARD, QEMB, ROOT, stdout_of, vectors_of, wait_for

MODEL = str(ROOT / "tests" / "fixtures" / "small.qemb")

QUERY = "a list of words"
LINES = ["A list of numbers.", "two", "Zwölf Boxkämpfer", "", "中文", "two", "a\tb \0 c", "last"]
TASK = "Given a web search query, retrieve relevant passages that answer the query"


def grep(*args, model=True, **kw):
    """The finished process; -m MODEL comes first unless model is false."""
    command = [QEMB, "grep", *(["-m", MODEL] if model else []), *map(as_argument, args)]
    kw.setdefault("stdout", subprocess.PIPE)
    if "stdin" not in kw:
        kw.setdefault("input", b"")
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=GUARD, **kw)


def as_argument(a):
    return a if isinstance(a, bytes) else str(a)


def out(*args, status=0, errors=None, **kw):
    """stdout of a run that must end with that status; stderr must be empty or match errors."""
    return stdout_of(grep(*args, **kw), status, errors)


def hits(*args, **kw):
    return [json.loads(line) for line in out("--json", *args, **kw).splitlines()]


@pytest.fixture
def notes(tmp_path):
    """A file of LINES."""
    path = tmp_path / "notes.txt"
    path.write_bytes(b"".join(l.encode() + b"\n" for l in LINES))
    return path


def expected(lines=LINES, *args, query=("--query",)):
    """[(line number, score)] of the lines that are not blank, best first; and the tolerance of a
    score: lines are rounded to halves (2^-11 of each number, so 2^-11 of a score's magnitudes,
    which are at most 1; below 2^-14 halves have an error of 2^-25, 1024 of them times numbers of a
    unit vector at most 2^-20), and sums of floats (at most 41 roundings of 2^-24)."""
    shown = [(i + 1, l) for i, l in enumerate(lines) if l.strip()]
    q = vectors_of([QUERY], *args, *query, model=MODEL)[0].astype(float)
    v = vectors_of([l for _, l in shown], *args, model=MODEL).astype(float)
    order = sorted(zip([i for i, _ in shown], v @ q), key=lambda x: (-x[1], x[0]))
    return order, 2.0**-11 + 2.0**-20 + 2.0**-18


# ---- scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, embed, query",
    [
        ((), (), ("--query",)),
        (("--dim", 20), ("--dim", "20"), ("--query",)),
        (("--instruct", "find"), (), ("--instruct", "find")),
        (("--cpu", "plain", "--threads", 1), ("--cpu", "plain"), ("--query",)),
    ],
)
def test_scores_are_those_of_the_vectors(args, embed, query, notes):
    want, tolerance = expected(LINES, *embed, query=query)
    got = hits("-k", 100, *args, QUERY, notes)
    assert {g["line"] for g in got} == {line for line, _ in want}
    score = dict(want)
    for g in got:
        assert abs(g["score"] - score[g["line"]]) <= tolerance
        assert g["text"] == LINES[g["line"] - 1] and g["file"] == str(notes)
    assert [g["score"] for g in got] == sorted((g["score"] for g in got), reverse=True)


def test_best_first_and_ties_by_position(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("x\ntwo\nx\n")
    b.write_text("two\nx\nx\n")
    got = [(g["text"], g["file"], g["line"]) for g in hits(QUERY, a, b)]
    x = [("x", str(a), 1), ("x", str(a), 3), ("x", str(b), 2), ("x", str(b), 3)]
    two = [("two", str(a), 2), ("two", str(b), 1)]
    assert got in (x + two, two + x)
    for k in range(1, 6):  # those that are kept are the first ones too
        assert [(g["text"], g["file"], g["line"]) for g in hits("-k", k, QUERY, a, b)] == got[:k]
    assert len(hits(QUERY, a, *[b] * 4)) == 10  # by default


def test_many_kept_lines():
    """A heap of thousands, beside Python's sort."""
    texts = [f"line {i % 701} {i % 13}" for i in range(1500)]
    data = "".join(t + "\n" for t in texts).encode()
    score = {g["line"]: g["score"] for g in hits("--min-score", -1, QUERY, input=data)}
    want = sorted(score, key=lambda line: (-score[line], line))
    for k in (37, 1499, 2147483647):
        assert [g["line"] for g in hits("-k", k, QUERY, input=data)] == want[:k]


def test_min_score_in_the_order_of_the_input(notes):
    everything = hits("--min-score", -1, QUERY, notes)
    assert [g["line"] for g in everything] == [1, 2, 3, 5, 6, 7, 8]
    scores = sorted(g["score"] for g in everything)
    for least in scores:
        want = [g for g in everything if g["score"] >= least]
        assert hits("--min-score", least, QUERY, notes) == want
    assert out("--min-score", 1, QUERY, notes, status=1) == b""


def test_min_score_answers_at_once():
    """As `tail -f | qemb grep` wants it: a line that was written is answered before the next."""
    command = [QEMB, "grep", "-m", MODEL, "--min-score", "-1", "-n", QUERY]
    p = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    guard = threading.Timer(GUARD, p.kill)
    guard.start()
    for i, text in enumerate((b"one", b"\ntwo", b"three")):
        p.stdin.write(text + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            c = p.stdout.read(1)
            assert c, "no answer"
            line += c
        assert re.fullmatch(rb"-?[01]\.\d{4}\t\d:" + text.strip() + rb"\n", line)
    p.stdin.close()
    assert p.wait(GUARD) == 0 and p.stdout.read() == b""
    guard.cancel()


# ---- what is printed ---------------------------------------------------------------------------


def test_prefixes(notes, tmp_path):
    other = tmp_path / "other"
    other.write_text("x\n")
    shape = lambda *args, **kw: {
        re.sub(rb"^-?[01]\.\d{4}\t", b"", l) for l in out("-k", 99, *args, **kw).splitlines()
    }
    name, two = str(notes).encode(), str(other).encode()
    plain = {l.encode() for l in LINES if l}
    numbered = {b"%d:%s" % (i + 1, l.encode()) for i, l in enumerate(LINES) if l}
    assert shape(QUERY, notes) == plain == shape("-h", QUERY, notes) == shape("-Hh", QUERY, notes)
    assert shape("-n", QUERY, notes) == numbered
    assert shape("-H", QUERY, notes) == {name + b":" + l for l in plain}
    assert shape("-nH", QUERY, notes) == {name + b":" + l for l in numbered}
    assert shape(QUERY, notes, other) == {name + b":" + l for l in plain} | {two + b":x"}
    assert shape("--no-filename", QUERY, notes, other) == plain | {b"x"}
    assert shape("-H", QUERY, input=b"x\n") == {b"(standard input):x"}
    assert shape("-H", QUERY, "-", input=b"x\n") == {b"(standard input):x"}
    assert hits(QUERY, input=b"x\n")[0]["file"] == "-"
    assert hits(QUERY, input=b"x\n")[0].keys() == {"score", "file", "line", "text"}


def test_options_and_operands_in_any_order(notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    want = out("-n", "-k", 2, QUERY, notes)
    assert out(QUERY, notes, "-k2", "-n") == want == out("-nk2", "--", QUERY, notes)
    (tmp_path / "-n").write_text("x\n")
    assert out("-k", 1, "--", "-k", "-n").endswith(b"\tx\n")  # the query -k in the file -n


def test_blank_lines_have_no_score():
    data = "\n \t\r\n\u00a0\u3000\n\v\f\nx\n\u200b\n\0\n".encode()
    got = hits(QUERY, input=data)  # a zero-width space and NUL are no white space
    assert {(g["line"], g["text"]) for g in got} == {(5, "x"), (6, "\u200b"), (7, "\0")}


def test_ends_of_lines_and_empty_files(tmp_path):
    texts = lambda data: [(g["line"], g["text"]) for g in hits("--min-score", -1, "q", input=data)]
    assert texts(b"a\r\nb") == [(1, "a"), (2, "b")]
    assert texts(b"a\r\r\n\nb\r") == [(1, "a\r"), (3, "b")]
    for data in (b"", b"\n\n"):
        assert out(QUERY, input=data, status=1) == b""
    (tmp_path / "empty").write_bytes(b"")
    assert out(QUERY, tmp_path / "empty", status=1) == b""


def on_terminal(*args):
    """What a terminal gets."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(QEMB, [QEMB, "grep", "-m", MODEL, *map(as_argument, args)])
    data = b""
    while True:
        try:
            chunk = os.read(fd, 65536)
        except OSError:
            break
        if not chunk:
            break
        data += chunk
    os.close(fd)
    return data.replace(b"\r\n", b"\n"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_colors(notes):
    one = ["-k", "1", "-nH", "--quiet"]
    plain = out(*one, QUERY, notes)
    assert b"\x1b" not in plain and out(*one, "--color", "never", QUERY, notes) == plain
    colored = out(*one, "--color", "always", QUERY, notes)
    assert re.sub(rb"\x1b\[\d*m", b"", colored) == plain
    m = re.fullmatch(rb"\x1b\[33m(.*?)\x1b\[m\t\x1b\[35m(.*?)\x1b\[m\x1b\[36m:\x1b\[m"
                     rb"\x1b\[32m(\d+)\x1b\[m\x1b\[36m:\x1b\[m(.*)\n", colored)
    assert m[2] == str(notes).encode()
    assert on_terminal(*one, QUERY, notes) == (colored, 0)
    assert on_terminal(*one, "--color=never", QUERY, notes) == (plain, 0)
    assert b"\x1b" not in out(*one, "--json", "--color", "always", QUERY, notes)


def test_a_terminal_gets_no_control_characters(tmp_path):
    """Raw elsewhere, as grep prints them."""
    hostile = tmp_path / "a\x1b]0;name\x07"
    text = "tab\t\x1b[2J\x07\x7f\u009b31m nul\0 é中 \u0085"
    hostile.write_text(text + "\n")
    shown = "tab\t?[2J???31m nul? é中 ?"
    got, status = on_terminal("--color", "never", "--quiet", "-H", QUERY, hostile)
    assert status == 0 and got.endswith(b"/a?]0;name?:" + shown.encode() + b"\n")
    got, _ = on_terminal("--json", "--quiet", QUERY, hostile)
    assert json.loads(got)["text"] == shown and not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", got)
    assert out("-H", QUERY, hostile).endswith(f"{hostile}:{text}\n".encode())
    assert hits(QUERY, hostile)[0]["text"] == text
    # behind the cut of --truncate there may be anything
    hostile.write_bytes(b"word " * 50 + b"\x9b\xff\n")
    got, _ = on_terminal("--truncate", "--max-tokens", "9", "--quiet", QUERY, hostile)
    assert got.endswith(b"word ??\n")


# ---- errors ------------------------------------------------------------------------------------

USAGE = [
    ((), "grep: no query"),
    (("",), "grep: an empty query"),
    (("-k", "3", "--min-score", "0.5", "q"), "-k and --min-score: only one"),
    (("-k", "0", "q"), r"--best: .*got 0, want 1\.\."),
    (("--min-score", "1.1", "q"), r"--min-score: not a score .got 1\.1, want -1\.\.1"),
    (("--min-score", "nan", "q"), "--min-score: not a score"),
    (("--min-score", "0x1", "q"), "--min-score: not a score"),
    (("--min-score", "", "q"), "--min-score: not a score"),
    (("--color", "red", "q"), "--color: unknown .got red, want auto, always, never"),
    (("--index", "", "q", "f"), "--index: an empty name"),
    (("--index", "x", "q"), "--index: not for standard input"),
    (("--index", "x", "q", "f", "-"), "--index: not for standard input"),
    (("--query", "q"), "--query: means nothing to qemb grep"),
    (("--output", "f32", "q"), "--output: means nothing to qemb grep"),
    (("--instruct", "", "q"), "--instruct: an empty task"),
    (("--dim", "4096", "q"), "--dim: out of range"),
    (("-z", "q"), "-z: unknown option"),
]


@pytest.mark.parametrize("args, message", USAGE, ids=[m for _, m in USAGE])
def test_usage_errors(args, message):
    assert out(*args, status=2, errors=rf"^qemb: .*{message}.*\nqemb: hint: qemb --help\n$") == b""


def test_options_of_grep_mean_nothing_elsewhere():
    for args in (["-k", "3"], ["-n"], ["--json"], ["--index", "x"], ["-H"]):
        command = [QEMB, "-m", MODEL, *args]
        p = subprocess.run(command, input=b"", stderr=subprocess.PIPE, timeout=GUARD)
        assert p.returncode == 1 and b"means nothing to qemb embed" in p.stderr
    p = subprocess.run([QEMB, "-h"], stdout=subprocess.PIPE, timeout=GUARD)
    assert p.returncode == 0 and b"--no-filename" in p.stdout


def test_the_status_of_errors_before_the_word_grep(notes):
    def run(*args):
        p = subprocess.run([QEMB, *args], input=b"", capture_output=True, timeout=GUARD)
        return p.returncode, p.stderr.count(b"\n")

    for args in (["-k", "abc"], ["--bogus"], ["-Z"], ["--js=1"], ["--dim=0"]):
        assert run("-m", MODEL, *args, "grep", "q") == (2, 2)
        assert run("-m", MODEL, *args, "--", "grep", "q") == (2, 2)
        assert run("-m", MODEL, *args, "embed") == (1, 2)
    assert run("-m", "grep", "--dim", "0") == (1, 2)  # a model of that name
    assert run("grep", "-k") == (2, 2) and run("-k") == (1, 2)
    shell = f"{QEMB} grep -m {MODEL} q {notes} >&-"
    p = subprocess.run(["sh", "-c", shell], stderr=subprocess.PIPE, timeout=GUARD)
    assert p.returncode == 2 and p.stderr == b"qemb: standard output: closed\n"


def test_bad_queries_and_models(tmp_path):
    assert out(b"\xff", status=2, errors="^qemb: query: .*invalid UTF-8.*\n$") == b""
    long = "word " * 20
    assert out("--max-tokens", 9, long, status=2, errors="^qemb: query: .*too long") == b""
    (tmp_path / "bad.qemb").write_bytes(b"x")
    for path in (tmp_path / "bad.qemb", tmp_path / "none"):
        p = grep("-m", path, "q", model=False)
        assert p.returncode == 2 and p.stderr.count(b"\n") == 1


def test_files_that_cannot_be_read(notes, tmp_path):
    want = out(QUERY, notes)
    none = tmp_path / "none"
    got = grep("-h", QUERY, none, notes, tmp_path)
    assert got.stdout == want and got.returncode == 2
    assert got.stderr.decode() == (
        f"qemb: {none}: cannot read (No such file or directory)\n"
        f"qemb: {tmp_path}: cannot read (Is a directory)\n"
    )
    assert out(QUERY, none, status=2, errors="cannot read") == b""
    # one line, and nothing for the terminal to execute
    p = grep(QUERY, b"a\x1b[2J\nb\x7f\xc2\x9b31m\x9bm\t\xc3\xa9")
    shown = "a?[2J?b??31m?m\té".encode()
    assert p.stderr == b"qemb: " + shown + b": cannot read (No such file or directory)\n"


def test_bad_lines_are_counted(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x\n\n\xff\ny\n\xc3\xff\n" + b"word " * 4000 + b"\n")
    b.write_bytes(b"z\n")
    p = grep("-h", "--min-score", -1, QUERY, a, b)
    assert [l.split(b"\t")[1] for l in p.stdout.splitlines()] == [b"x", b"y", b"z"]
    assert p.returncode == 2
    assert re.fullmatch(rf"qemb: {a}: 3 lines failed, first line 3: text: invalid UTF-8 .*\n",
                        p.stderr.decode())
    p = grep("--truncate", QUERY, input=b"word " * 4000 + b"\n\xff\n")
    assert p.returncode == 2 and p.stdout.endswith(b"word \n")
    assert p.stderr.startswith(b"qemb: standard input: 1 line failed, first line 2: ")


def test_hostile_files(tmp_path):
    """NULs, random bytes, a line of 100 MB: what can be scored is."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1000000) + b"\nx\n")
    assert out(QUERY, path, status=2, errors="1 line failed, first line 1: .*too long").endswith(
        b"\tx\n")
    path.write_bytes(np.random.default_rng(1).bytes(300000) + b"\nx\n")
    assert b"\tx\n" in out("-k", 100000, QUERY, path, status=2, errors="lines failed")
    with open(path, "wb") as f:
        f.write(b"before\n" + b"word and " * 12_000_000 + b"\nafter\n")
    got = hits(QUERY, path, status=2, errors="1 line failed, first line 2: .*too long")
    assert {g["text"] for g in got} == {"before", "after"}
    best = ("--truncate", "-k", 1, "--max-tokens", 9, QUERY, path)
    g, = hits(*best)
    assert out("-n", *best) == f"{g['score']:.4f}\t{g['line']}:{g['text']}\n".encode()


def test_the_output_is_no_input(tmp_path):
    """Else `qemb grep QUERY * > out` would read what it writes."""
    path = tmp_path / "out"
    path.write_text("x\n")
    run = lambda *args, **kw: out("--min-score", -1, QUERY, *args, status=2, **kw)
    with open(path, "ab") as f:
        run(path, stdout=f, errors="out: is also the output\n$")
        with open(path) as g:
            run("-", stdin=g, stdout=f, errors="^qemb: standard input: is also the output\n$")
        run("--index", tmp_path / "x", path, stdout=f, errors="out: is also the output\n$")
    assert path.read_text() == "x\n"
    assert out("--index", tmp_path / "x", QUERY, path).endswith(b"\tx\n")
    assert list(tmp_path.glob("x*")) == [tmp_path / "x"]


def test_a_fifo_without_a_writer(notes, tmp_path):
    """It holds no line back and no signal, as any input that has nothing ready."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [QEMB, "grep", "-h", "-m", MODEL, "--min-score", "-1", QUERY, notes, fifo]
    for sig in (None, signal.SIGTERM):
        p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        guard = threading.Timer(GUARD, p.kill)
        guard.start()
        got = [p.stdout.readline() for _ in range(7)]
        assert got[-1].endswith(b"\tlast\n")
        if sig:
            p.send_signal(sig)
        else:
            fifo.write_bytes(b"from the fifo\n")
        stdout, stderr = p.communicate()
        guard.cancel()
        assert stderr == b"" and p.returncode == (-sig if sig else 0)
        assert sig or stdout.endswith(b"\tfrom the fifo\n")


def test_a_closed_pipe_ends_it_quietly(notes):
    shell = f"(yes; true) | {{ {QEMB} grep -m {MODEL} --min-score -1 q; echo $? >&2; }} | head -n 1"
    p = subprocess.run(["bash", "-c", shell], capture_output=True, timeout=GUARD)
    assert p.stdout.count(b"\n") == 1 and p.stderr == b"2\n"
    with open("/dev/full", "wb") as full:
        out(QUERY, notes, stdout=full, status=2,
            errors=r"^qemb: standard output: cannot write \(No space left on device\); 0 rows are "
                   r"whole, the first 0 bytes\n$")


def test_closed_standard_input(notes):
    def run(command):
        shell = f"{QEMB} grep -m {MODEL} {command} <&-"
        return subprocess.run(["sh", "-c", shell], capture_output=True, timeout=GUARD)

    p = run("q")
    assert p.returncode == 2 and p.stderr == b"qemb: standard input: closed\n"
    assert run(f"q {notes}").returncode == 0


def test_a_signal_prints_the_best_so_far():
    """Ctrl-C after `tail -f | qemb grep`, as it ends the input of the embed command."""
    p = subprocess.Popen([QEMB, "grep", "-m", MODEL, "--progress", QUERY], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    guard = threading.Timer(GUARD, p.kill)
    guard.start()
    p.stdin.write(b"two\nhalf")
    shown = b""
    while b"1 texts" not in shown:
        chunk = p.stderr.read(1000)
        assert chunk
        shown += chunk
    p.send_signal(signal.SIGINT)
    assert p.stdout.read().endswith(b"\ttwo\n") and p.wait(GUARD) == -signal.SIGINT
    guard.cancel()
    p.stdin.close()


# ---- the demo model ----------------------------------------------------------------------------


def test_the_demo_model_that_belongs_to_the_program(notes, tmp_path):
    want = out(QUERY, notes)
    program = tmp_path / "bin" / "qemb"
    program.parent.mkdir()
    shutil.copy(QEMB, program)
    run = lambda: subprocess.run([program, "grep", QUERY, notes], capture_output=True, cwd=ROOT,
                                 timeout=GUARD)
    p = run()
    assert p.returncode == 2 and b"no demo model beside the program" in p.stderr
    for place in ("bin/examples", "share/qemb"):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(MODEL, tmp_path / place / "demo.qemb")
        p = run()
        assert p.returncode == 0 and p.stdout == want
    (tmp_path / "share/qemb/demo.qemb").write_bytes(b"x")  # this place is asked first
    assert run().returncode == 2
    p = subprocess.run([program], input=b"x\n", capture_output=True, timeout=GUARD)
    assert p.returncode == 1 and b"no model" in p.stderr  # other commands have no default


# ---- the index ---------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path):
    """Files with every kind of line; with the arguments that name them."""
    rng = np.random.default_rng(5)
    words = "one two three list number letter word music play file".split()
    texts = [" ".join(rng.choice(words, rng.integers(1, 6))) for _ in range(400)]  # two blocks
    (tmp_path / "a").write_text("\r\n".join(texts[:280]))
    (tmp_path / "b").write_bytes(b"\n\xff\n" + LINES[2].encode() + b"\n" + b"w " * 4000 + b"\n  x")
    (tmp_path / "c").write_text("")
    (tmp_path / "d").write_text("\n\n".join(texts[280:]))
    return [tmp_path / name for name in "abcd"]


def same(p, q):
    return (p.returncode, p.stdout, p.stderr) == (q.returncode, q.stdout, q.stderr)


@pytest.mark.parametrize("more", [(), ("--dim", 33), ("--truncate", "--max-tokens", 6)])
def test_the_same_with_an_index(library, tmp_path, more):
    """To the last bit (--json has all of a score), also what is said of bad lines."""
    index = tmp_path / "x.qidx"
    for args in (("-k", 20), ("-k", 5000), ("--min-score", 0.9), ("--min-score", -1, "-n")):
        for form in (("--json",), ()):
            without = grep(*args, *form, *more, QUERY, *library)
            for threads in (1, 3):
                run = grep(*args, *form, *more, "--index", index, "--threads", threads, QUERY,
                           *library)
                assert same(run, without)
    assert without.returncode == 2 and without.stdout.count(b"\n") >= 390


def another_model(at):
    """MODEL with another byte in its header, and the header's checksum (qemb.h) made true."""
    model = bytearray(Path(MODEL).read_bytes())
    model[at] ^= 1
    model[24:32] = bytes(8)
    checksum = 0xCBF29CE484222325
    for byte in model[: 4096 + 96 * int.from_bytes(model[32:36], "little")]:
        checksum = (checksum ^ byte) * 0x100000001B3 % 2**64
    model[24:32] = checksum.to_bytes(8, "little")
    return model


def made(index):
    """What changes when an index is made again."""
    return os.stat(index).st_ino, Path(index).read_bytes()


def test_an_index_is_made_again_only_when_it_is_stale(notes, tmp_path):
    index = tmp_path / "x.qidx"
    use = lambda *args, files=(notes,): out("--index", index, *args, QUERY, *files)
    use()
    inode, data = made(index)
    for args in ((), ("-k", 3), ("--threads", 1), ("--instruct", "x"), ("--min-score", 0)):
        use(*args)
        assert made(index) == (inode, data), args
    shutil.copy(notes, tmp_path / "copy")
    use(files=[tmp_path / "copy"])  # its name does not matter, its contents do
    assert made(index) == (inode, data)
    last = made(index)
    for args in (("--dim", 20), ("--max-tokens", 100), ("--truncate",), ("--cpu", "plain"), ()):
        use(*args)
        assert made(index) != last, args
        last = made(index)
    assert last[1] == data
    for byte in (50, 109):  # in the SHA-256, which covers the tensors; in rope_theta
        (tmp_path / "m.qemb").write_bytes(another_model(byte))
        last = made(index)
        use("-m", tmp_path / "m.qemb")
        assert made(index) != last, byte
    for text in (b"two\n", b"too\n", b"two\ntwo\n"):
        notes.write_bytes(text)
        got = use()
        assert got == out(QUERY, notes)
    good = index.read_bytes()
    for version in (0, 2, 255):  # of the format, be it older or newer: like another qemb
        for data in (good, good[:16]):
            index.write_bytes(data[:8] + bytes([version]) + data[9:])
            use()
            assert index.read_bytes() == good
    use(files=[notes, notes])
    assert use(files=[notes]) == out(QUERY, notes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "m.qemb", "notes.txt", "x.qidx"]


def test_who_may_read_an_index_and_where_it_is(notes, tmp_path):
    """Vectors tell much of their texts: the owner's alone, unless it had other permissions."""
    index, link = tmp_path / "x.qidx", tmp_path / "link"
    mode = lambda: os.stat(index).st_mode & 0o777
    use = lambda *args: out("--index", link, *args, QUERY, notes)
    link.symlink_to(index)
    out("--index", index, QUERY, notes)
    assert mode() == 0o600
    for i, bits in enumerate((0o644, 0o640, 0o666, 0o400)):
        index.chmod(bits)
        last = made(index)
        use("--dim", 10 + i)
        assert made(index) != last and mode() == bits
    assert link.is_symlink() and link.samefile(index)
    assert {p.name for p in tmp_path.iterdir()} == {"link", "notes.txt", "x.qidx"}


def test_what_is_no_index_is_left_alone(notes, tmp_path):
    index = tmp_path / "x.qidx"
    out("--index", index, QUERY, notes)
    good = index.read_bytes()
    changes = {
        "not an index of qemb grep": [b"", b"my diary\n", good[:5], b"Q" + good[1:]],
        "damaged": [good[:-1], good + b"\0", good[:4200] + b"\x55" + good[4201:],
                    good[:-300] + b"\x55" + good[-299:], good[:3000]],
    }
    for message, files in changes.items():
        for data in files:
            index.write_bytes(data)
            got = out("--index", index, QUERY, notes, status=2, errors=rf"^qemb: .*{message}.*\n$")
            assert got == b"" and index.read_bytes() == data
    out("--index", notes, QUERY, notes, status=2, errors="not an index")
    out("--index", tmp_path, QUERY, notes, status=2, errors="not an index")
    out("--index", tmp_path / "none" / "x", QUERY, notes, status=2, errors="cannot write it")


def test_an_index_of_some_files(notes, tmp_path):
    index, fifo = tmp_path / "x.qidx", tmp_path / "fifo"
    os.mkfifo(fifo)
    want = out("-H", QUERY, notes)
    p = grep("--index", index, QUERY, tmp_path / "none", fifo, tmp_path, notes)
    assert p.returncode == 2 and p.stdout == want
    assert p.stderr.decode().splitlines() == [
        f"qemb: {tmp_path}/none: cannot read (No such file or directory)",
        f"qemb: {fifo}: not a regular file, which --index needs",
        f"qemb: {tmp_path}: cannot read (Is a directory)",
    ]
    assert not index.exists()  # it would be one of some files
    assert out("--index", index, QUERY, tmp_path / "none", status=2, errors="none") == b""
    assert not index.exists()


def test_compressed_files(notes, tmp_path):
    """Searched like what they hold; an index has the places of lines, so it leaves them out."""
    for kind, compress in (("gz", gzip.compress), ("zst", zstandard.compress)):
        data = compress(notes.read_bytes())
        path = tmp_path / f"notes.{kind}"
        path.write_bytes(data)
        assert out("-n", QUERY, path) == out("-n", QUERY, input=data) == out("-n", QUERY, notes)
        both = hits("-k", 99, QUERY, path, notes)
        assert [(h["score"], h["line"], h["text"]) for h in both if h["file"] == str(path)] == [
            (h["score"], h["line"], h["text"]) for h in both if h["file"] == str(notes)
        ]
        index = tmp_path / f"{kind}.qidx"
        said = f"^qemb: {path}: compressed, which --index cannot take .decompress it.\n$"
        got = out("--index", index, "-h", QUERY, path, notes, status=2, errors=said)
        assert got == out(QUERY, notes) and not index.exists()
        path.write_bytes(data[:-4])
        said = f"^qemb: {path}: cannot read .compressed data: cut off.\n$"
        assert out("-h", "-k", 99, QUERY, notes, path, status=2, errors=said).count(b"\n") > 7


def test_an_index_survives_a_missing_file(notes, tmp_path):
    """A misspelt name must not replace an index of all files by one of the others."""
    index, other = tmp_path / "x.qidx", tmp_path / "other"
    other.write_text("other\n")
    use = lambda *files, **kw: out("-h", "--index", index, QUERY, *files, **kw)
    both = use(notes, other)
    last = made(index)
    none = dict(status=2, errors=r"/none: cannot read \(No such file or directory\)\n$")
    assert use(tmp_path / "none", **none) == b"" and made(index) == last
    assert use(notes, tmp_path / "none", **none) == out(QUERY, notes) and made(index) == last
    assert use(notes, other, tmp_path / "none", **none) == both and made(index) == last
    kw = dict(status=2, errors="^qemb: /dev/null: not a regular file, which --index needs\n$")
    assert use(notes, "/dev/null", **kw) == out(QUERY, notes) and made(index) == last
    kw = dict(status=2, errors="^qemb: .*/x.qidx: is the index\n$")
    assert use(notes, other, index, **kw) == both and made(index) == last


def test_a_file_that_is_away_for_a_moment_is_not_indexed_as_empty(tmp_path):
    index, a, b = tmp_path / "x.qidx", tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one\ntwo\n" * 200000)
    b.write_text("three\n")
    p = subprocess.Popen([QEMB, "grep", "-m", MODEL, "--index", index, QUERY, a, b],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    wait_for(lambda: list(tmp_path.glob("x.qidx.*")))
    b.rename(tmp_path / "away")
    message = p.stderr.readline().decode()
    (tmp_path / "away").rename(b)
    assert message == f"qemb: {b}: cannot read (No such file or directory)\n"
    assert p.communicate(timeout=GUARD) == (b"", b"") and p.returncode == 2
    assert sorted(tmp_path.iterdir()) == [a, b]


def test_a_text_that_changes_while_it_is_read_gets_no_index(tmp_path):
    index, text = tmp_path / "x.qidx", tmp_path / "text"
    text.write_bytes(b"one\ntwo\n" * 200000)
    p = subprocess.Popen([QEMB, "grep", "-m", MODEL, "--index", index, QUERY, text],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: list(tmp_path.glob("x.qidx.*")))
    with open(text, "ab") as f:
        f.write(b"three\n")
    stdout, stderr = p.communicate(timeout=GUARD)
    assert p.returncode == 2 and stdout == b""
    assert stderr.decode() == f"qemb: {text}: changed while it was read; no index is made\n"
    assert list(tmp_path.iterdir()) == [text]


def test_two_runs_at_once_and_a_killed_one(library, tmp_path):
    index = tmp_path / "x.qidx"
    want = grep(QUERY, *library)
    command = [QEMB, "grep", "-m", MODEL, "--index", index, QUERY, *library]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(3)]
    for p in runs:
        stdout, _ = p.communicate(timeout=GUARD)
        assert stdout == want.stdout and p.returncode == want.returncode
    assert len(list(tmp_path.iterdir())) == len(library) + 1
    runs = []  # each replaces the other's index, and has its own in hand
    for i in range(6):
        more = ["--dim", "20"] if i % 2 else []
        runs.append((more, subprocess.Popen([*command[:2], *more, *command[2:]],
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)))
    wants = {0: want, 2: grep("--dim", 20, QUERY, *library)}
    for more, p in runs:
        assert (*p.communicate(timeout=GUARD), p.returncode) == (
            wants[len(more)].stdout, wants[len(more)].stderr, wants[len(more)].returncode)
    before = index.read_bytes()
    big = tmp_path / "big"
    big.write_text("".join(f"line {i} of a long file\n" for i in range(200000)))
    for sig in (signal.SIGTERM, signal.SIGKILL):
        p = subprocess.Popen([*command[:-len(library)], big], stdout=subprocess.PIPE)
        wait_for(lambda: list(tmp_path.glob("x.qidx.*")))
        p.send_signal(sig)
        assert p.wait(GUARD) == -sig and p.stdout.read() == b""
        p.stdout.close()
        assert index.read_bytes() == before
        assert len(list(tmp_path.glob("x.qidx.*"))) == (sig == signal.SIGKILL)
