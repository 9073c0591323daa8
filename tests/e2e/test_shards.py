"""`qemb shards`: many files, several processes, kills at any moment.

QEMB_BIN names the program, as in test_protocol.py. What an output has to be, the pipe says.
"""

import gzip
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import edit_qemb
import numpy as np
import pytest
import zstandard
from helpers import GUARD, QEMB, ROOT, is_sanitized, wait_for

MODEL = str(ROOT / "tests" / "fixtures" / "small.qemb")
SANITIZED = is_sanitized(QEMB)
DIM = 8
OPTIONS = ("--dim", DIM, "--threads", 1)


def command(*args, model=MODEL):
    return [QEMB, "shards", "-m", str(model), *map(str, OPTIONS), *map(str, args)]


def shards(*args, status=0, model=MODEL, **kw):
    """The messages of a run that must end with that status."""
    kw.setdefault("input", b"") if "stdin" not in kw else None
    p = subprocess.run(command(*args, model=model), capture_output=True, timeout=GUARD, **kw)
    assert p.returncode == status, p.stderr.decode()
    assert p.stdout == b""
    return p.stderr.decode()


def start(*args, **kw):
    kw = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, **kw}
    return subprocess.Popen(command(*args), **kw)


def summary(messages):
    """(shards, made, there, failed, rows, errors) of the last message."""
    shards = r"(\d+) shards: (\d+) made, (\d+) were there, (\d+) failed"
    counts = re.search(rf"qemb: {shards}.*; (\d+) rows, (\d+) errors\n", messages).groups()
    return tuple(map(int, counts))


def pipe(data, *args, model=MODEL):
    """What the pipe writes."""
    p = subprocess.run(
        [QEMB, "-m", str(model), *map(str, (*OPTIONS, *args))],
        input=data,
        capture_output=True,
        timeout=GUARD,
    )
    assert p.returncode in (0, 3), p.stderr
    return p.stdout


def write_files(folder, n, rows=20):
    """n files, of which each has other texts. Returns the paths."""
    folder.mkdir()
    paths = [folder / f"part-{i:03}.txt" for i in range(n)]
    for i, path in enumerate(paths):
        path.write_bytes(b"".join(b"text %d of file %d\n" % (k, i) for k in range(rows + i % 3)))
    return paths


def record(out, path):
    return json.loads((out / f"{path.name}.json").read_text())


def expected(paths, *args):
    """The pipe's bytes for each file: of one run, if they can be told apart."""
    data = [p.read_bytes() for p in paths]
    if {"jsonl", "npy"} & set(args):
        return [pipe(d, *args) for d in data]
    whole, counts = pipe(b"".join(data), *args), [d.count(b"\n") for d in data]
    binary = {"f32", "f16", "int8", "binary"} & set(args)
    width = len(whole) // sum(counts)  # of a vector, if they are alike
    rows = whole.splitlines(keepends=True)
    if binary:
        rows = [whole[i : i + width] for i in range(0, len(whole), width)]
    assert len(rows) == sum(counts)
    return [b"".join(rows.pop(0) for _ in range(n)) for n in counts]


def check_all(out, paths, *args, ext="jsonl"):
    """Every shard has the pipe's bytes, its JSON is right, and nothing else is there."""
    names = set()
    for path, want in zip(paths, expected(paths, *args)):
        names |= {f"{path.name}.{ext}", f"{path.name}.json"}
        data, got = path.read_bytes(), (out / f"{path.name}.{ext}").read_bytes()
        assert got == want, path
        r = record(out, path)
        assert r["sha256"] == hashlib.sha256(got).hexdigest() and r["bytes"] == len(got)
        sha256 = hashlib.sha256(data).hexdigest()
        assert r["input"] == {"bytes": len(data), "sha256": sha256}
        assert r["rows"] == r["records"] == data.count(b"\n") and r["errors"] == 0
    assert {p.name for p in out.iterdir()} == names


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path / "in", 4)


# ---- what is made -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", "json jsonl tsv base64 f32 f16 npy int8 binary".split())
def test_the_bits_of_the_pipe(kind, files, tmp_path):
    out = tmp_path / "out"
    assert summary(shards("--output", kind, "--out", out, *files)) == (4, 4, 0, 0, 83, 0)
    check_all(out, files, "--output", kind, ext="jsonl" if kind == "json" else kind)
    assert record(out, files[0])["output"] == kind
    if kind == "npy":
        assert np.load(out / f"{files[0].name}.npy").shape == (20, DIM)


def test_options_are_those_of_the_pipe(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b'{"id":"a","text":"x"}\0{"id":"b","text":"y","instruct":"find"}')
    args = ("--input", "jsonl", "-0", "--output", "jsonl", "--query", "--max-tokens", 30)
    shards(*args, "--out", tmp_path / "out", path)
    assert (tmp_path / "out/in.jsonl").read_bytes() == pipe(path.read_bytes(), *args)


def test_empty_files_and_files_without_an_end(tmp_path):
    paths = [tmp_path / "empty", tmp_path / "open"]
    for path, data in zip(paths, (b"", b"one\ntwo")):
        path.write_bytes(data)
    assert summary(shards("--output", "npy", "--out", tmp_path / "out", *paths))[4] == 2
    assert [record(tmp_path / "out", p)["rows"] for p in paths] == [0, 2]
    assert np.load(tmp_path / "out/empty.npy").shape == (0, DIM)
    many = [tmp_path / f"empty-{i}" for i in range(9)]  # more than there are batches
    for path in many:
        path.touch()
    assert summary(shards("--out", tmp_path / "out", *many)) == (9, 9, 0, 0, 0, 0)


def test_compressed_files(files, tmp_path):
    data = files[0].read_bytes()
    out = tmp_path / "out"
    for compress in (gzip.compress, zstandard.compress):
        files[0].write_bytes(compress(data))
        assert summary(shards("--out", out, files[0]))[1] == 1
        assert (out / f"{files[0].name}.jsonl").read_bytes() == pipe(data)
        size, digest = len(compress(data)), hashlib.sha256(files[0].read_bytes()).hexdigest()
        assert record(out, files[0])["input"] == {"bytes": size, "sha256": digest}
        assert summary(shards("--out", out, files[0]))[2] == 1
    files[0].write_bytes(gzip.compress(data)[:-5])
    said = shards("--out", out, *files[:2], status=1)
    assert f"{files[0]}: cannot read (compressed data: cut off)\n" in said
    assert summary(said)[:4] == (2, 1, 0, 1)


def test_a_list_on_standard_input(files, tmp_path):
    listed = b"\n".join(os.fsencode(p) for p in files[1:]) + b"\n\n"
    got = shards("--out", tmp_path / "out", "-", files[0], input=listed)
    assert summary(got)[:2] == (4, 4)
    check_all(tmp_path / "out", files)
    assert summary(shards("--out", tmp_path / "out", "-"))[0] == 0
    assert "NUL" in shards("--out", tmp_path / "out", "-", input=b"a\0b\n", status=1)


def test_a_name_that_is_not_utf8(tmp_path):
    path, out = os.fsencode(tmp_path) + b"/caf\xe9\n.txt", tmp_path / "out"
    Path(os.fsdecode(path)).write_bytes(b"text\n")
    args = [os.fsencode(a) for a in command("--out", out)]
    for made in (1, 0):
        p = subprocess.run([*args, path], capture_output=True, timeout=GUARD)
        assert p.returncode == 0 and summary(p.stderr.decode())[:2] == (1, made)
    names = sorted(os.listdir(os.fsencode(out)))
    assert names == [b"caf\xe9\n.txt.json", b"caf\xe9\n.txt.jsonl"]
    with open(os.fsencode(out) + b"/" + names[0]) as f:
        assert json.load(f)["file"] == "caf??.txt.jsonl"


# ---- counts -------------------------------------------------------------------------------------

RECORDS = [b"one", b"", b"bad \xff", b"two", b"", b"three"]


def forms():
    """The same records in each form of input, with the options that say so."""
    yield (), b"\n".join(RECORDS)
    yield (), b"\r\n".join(RECORDS) + b"\r\n"
    yield (), gzip.compress(b"\n".join(RECORDS) + b"\n")
    yield ("-0",), b"\0".join(RECORDS) + b"\0"
    objects = [b'{"text":5}' if b"bad" in r else b'{"text":"%s"}' % r for r in RECORDS]
    yield ("--input", "jsonl"), b"\n".join(objects)
    yield ("--input", "jsonl", "-0"), b"\0".join(objects)


@pytest.mark.parametrize("policy", ["record", "skip", "zero"])
@pytest.mark.parametrize("form", range(6))
def test_rows_and_ids_are_counted_alike(form, policy, tmp_path):
    """In the output of each kind, an npy's header, ids, messages, --stats and a shard's JSON."""
    args, data = list(forms())[form]
    args = (*args, "--on-error", policy)
    rows = len(RECORDS) - (policy == "skip")
    path, out = tmp_path / "in", tmp_path / "out"
    path.write_bytes(data)
    for kind in ("jsonl", "npy") if policy != "record" else ("jsonl",):
        p = subprocess.run(
            [QEMB, "-m", MODEL, *map(str, OPTIONS), *args, "--output", kind, "--stats"],
            input=data,
            capture_output=True,
            timeout=GUARD,
        )
        said = p.stderr.decode()
        assert "qemb: 1 of 6 records failed\n" in said and "qemb: 5 texts, " in said
        assert f" 1 errors, {rows} rows, " in said
        assert ("qemb: record 3: " in said) == (policy != "record")
        if kind == "npy":
            assert np.load(io.BytesIO(p.stdout)).shape == (rows, DIM)
        else:
            got = [json.loads(l) for l in p.stdout.splitlines()]
            want = [i for i in range(1, 7) if (i, policy) != (3, "skip")]
            assert len(got) == rows and [g["id"] for g in got] == want
            tokens = sum(g.get("tokens", 0) for g in got)
            assert f"qemb: 5 texts, {tokens} tokens in " in said
        said = shards("--out", out, *args, "--output", kind, "--errors-ok", path)
        assert summary(said)[4:] == (rows, 1)
        r = record(out, path)
        assert (r["records"], r["rows"], r["errors"]) == (6, rows, 1)
        if kind == "jsonl":
            assert r["tokens"] == tokens


# ---- what is made again -------------------------------------------------------------------------


def test_finished_shards_are_left_alone(files, tmp_path):
    out = tmp_path / "out"
    shards("--out", out, *files)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert summary(shards("--out", out, *files)) == (4, 0, 4, 0, 83, 0)
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}


def test_a_changed_input_is_made_again(files, tmp_path):
    """Also with the same size and time."""
    out = tmp_path / "out"
    shards("--out", out, *files)
    data = files[1].read_bytes()
    for new in (data + b"more\n", data + b"MORE\n"):
        stat = files[1].stat()
        files[1].write_bytes(new)
        os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert summary(shards("--out", out, *files))[1:3] == (1, 3)
        check_all(out, files)


def test_another_recipe_is_made_again(files, tmp_path):
    out, f = tmp_path / "out", edit_qemb.Qemb(MODEL)
    f.prompts = {"query": "other: ", "document": ""}
    other = f.write(tmp_path / "other.qemb")
    tables = subprocess.run([QEMB, "--cpu", "abacus"], capture_output=True).stderr.decode()
    runs = [
        (MODEL, ()),
        (MODEL, ("--query",)),
        (other, ("--query",)),
        (MODEL, ("--instruct", "find it")),
        (MODEL, ("--truncate",)),
        (MODEL, ("--truncate", "--max-tokens", 9)),
        (MODEL, ("--dim", 7)),
        (MODEL, ("--on-error", "skip")),
        (MODEL, ("--output", "tsv")),
        (MODEL, ("-0",)),
        (MODEL, ("--input", "jsonl", "--output", "jsonl", "--errors-ok")),
        (MODEL, ("--input", "jsonl", "--output", "jsonl", "--errors-ok", "--keep")),
    ]
    if "avx2" in tables:
        runs.append((MODEL, ("--cpu", "plain")))
    for model, args in runs:
        assert summary(shards("--out", out, *args, *files[:2], model=model))[1:3] == (2, 0), args
        assert summary(shards("--out", out, *args, *files[:2], model=model))[1:3] == (0, 2), args
        ext = "tsv" if "tsv" in args else "jsonl"
        for path in files[:2]:
            got = (out / f"{path.name}.{ext}").read_bytes()
            assert got == pipe(path.read_bytes(), *args, model=model)


def test_options_that_change_no_bit_make_nothing_again(files, tmp_path):
    shards("--out", tmp_path / "out", *files)
    args = ("--errors-ok", "--batch-tokens", 50, "--threads", 2, "--stats", "--quiet")
    assert summary(shards("--out", tmp_path / "out", *args, *files))[1:3] == (0, 4)


def test_damage_is_made_again(files, tmp_path):
    out = tmp_path / "out"
    shards("--out", out, *files)
    note, vectors = out / f"{files[0].name}.json", out / f"{files[0].name}.jsonl"
    text = note.read_text()
    for damage in (
        lambda: note.unlink(),
        lambda: note.write_text(""),
        lambda: note.write_text(text[: len(text) // 2]),
        lambda: note.write_text("[]"),
        lambda: note.write_text(text.replace('"rows"', '"ruws"')),
        lambda: vectors.unlink(),
        lambda: vectors.write_bytes(vectors.read_bytes()[:-1]),
    ):
        damage()
        assert summary(shards("--out", out, *files))[1:3] == (1, 3)
        check_all(out, files)
        assert note.read_text() == text


# ---- errors -------------------------------------------------------------------------------------




def test_one_bad_record_among_20000(tmp_path):
    path, out = tmp_path / "in.txt", tmp_path / "out"
    lines = [b"word %d" % (i % 50) for i in range(20000)]
    lines[12345] = b"bad \xff"
    path.write_bytes(b"\n".join(lines) + b"\n")
    args = ("--output", "jsonl", "--dim", 1)
    said = shards("--out", out, "--errors-ok", *args, path)
    assert summary(said) == (1, 1, 0, 0, 20000, 1)
    got = (out / "in.txt.jsonl").read_bytes().splitlines()
    errors = [json.loads(l) for l in got if b'"error"' in l]
    assert len(got) == 20000 and [e["line"] for e in errors] == [12346]
    r = record(out, path)
    assert (r["records"], r["rows"], r["errors"]) == (20000, 20000, 1)
    # a shard with errors is finished; the status tells of them also when it was there before
    assert summary(shards("--out", out, "--errors-ok", *args, path))[2] == 1
    assert summary(shards("--out", out, *args, path, status=3))[2] == 1


def test_errors_in_binary(tmp_path):
    paths, out = [tmp_path / "bad", tmp_path / "good"], tmp_path / "out"
    paths[0].write_bytes(b"one\n\xff\ntwo\n")
    paths[1].write_bytes(b"three\n")
    args = ("--out", out, "--output", "npy")
    for more, rows in ((("--on-error", "zero"), 3), (("--on-error", "skip"), 2)):
        said = shards(*args, *more, "--errors-ok", *paths)
        assert f"{paths[0]}: record 2: invalid_utf8: " in said
        r = record(out, paths[0])
        assert (r["records"], r["rows"], r["errors"]) == (3, rows, 1)
        assert len(np.load(out / "bad.npy")) == rows
        shards(*args, *more, *paths, status=3)
    shutil.rmtree(out)
    said = shards(*args, *paths, status=3)  # stop: that shard is not made, the other one is
    assert f"{paths[0]}: record 2: invalid_utf8: " in said and summary(said)[1:4] == (1, 0, 1)
    paths[0].write_bytes(b"\xff\n\xff\n")
    assert shards(*args, *paths, status=3).count("invalid_utf8") == 1
    assert sorted(p.name for p in out.iterdir()) == ["good.json", "good.npy"]


def test_files_that_cannot_be_read(files, tmp_path):
    out, fifo = tmp_path / "out", tmp_path / "fifo"
    os.mkfifo(fifo)
    said = shards("--out", out, tmp_path / "none", fifo, tmp_path / "in", *files, status=1)
    assert said.splitlines()[:3] == [
        f"qemb: {tmp_path}/none: cannot read (No such file or directory)",
        f"qemb: {fifo}: cannot read (not a regular file)",
        f"qemb: {tmp_path}/in: cannot read (a directory; want the files in it)",
    ]
    assert summary(said)[:4] == (7, 4, 0, 3)
    check_all(out, files)


@pytest.mark.parametrize(
    "args, message",
    [
        (("a",), r"shards: no directory .want --out DIR"),
        (("--out", "o"), "shards: no input"),
        (("--out", "o", "-", "-"), "-: given twice"),
        (("--out", "o", "x/a", "y/b", "y/a"), "x/a, y/a: two inputs of one name"),
        (("--out", "o", "x/a", "x/a"), "x/a, x/a: two inputs of one name"),
        (("--out", "x", "x/a"), "x/a: an input in the directory of --out"),
        (("--out", ".", "a"), "a: an input in the directory of --out"),
        (("--out", "o", "--errors-ok", "--output", "npy", "a"), "--errors-ok: .*zero or skip"),
        (("--out", "o", "-k", "3", "a"), "--best: means nothing to qemb shards"),
    ],
)
def test_usage(args, message, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a").write_bytes(b"text\n")
    said = shards(*args, status=1, cwd=tmp_path).splitlines()
    assert re.search(message, said[0]) and said[1:] == ["qemb: hint: qemb --help"]
    assert (tmp_path / "x/a").read_bytes() == b"text\n" and len(os.listdir(tmp_path / "x")) == 1


def test_a_directory_that_cannot_be_written(files, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    said = shards("--out", tmp_path / "file", *files, status=4)
    assert said == f"qemb: {tmp_path}/file: cannot open it (Not a directory)\n"
    said = shards("--out", tmp_path / "no/where", *files, status=4)
    assert said == f"qemb: {tmp_path}/no/where: cannot make it (No such file or directory)\n"
    if os.geteuid():  # root may write
        (tmp_path / "ro").mkdir(mode=0o555)
        assert "cannot write to it (Permission denied)" in shards(
            "--out", tmp_path / "ro", *files, status=4
        )


def test_a_full_disk_leaves_no_shard(files, tmp_path):
    """RLIMIT_FSIZE stands for the disk: writes behind it fail in the same way. With room for the
    vectors of short files alone, those are made."""
    big, out = tmp_path / "big.txt", tmp_path / "out"
    big.write_bytes(b"".join(b"text %d\n" % i for i in range(600)))

    def limit(most=4000):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    for kind in ("f32", "npy"):
        said = shards("--out", out, "--output", kind, files[0], big, files[1], status=4,
                      preexec_fn=limit)
        assert f"{out}: cannot write the output of {big} (File too large)\n" in said
        assert summary(said)[:4] == (3, 2, 0, 1)
        check_all(out, files[:2], "--output", kind, ext=kind)
        shutil.rmtree(out)
    # room for the vectors, but not for their JSON
    big.write_bytes(b"one\n")
    args = ("--out", out, "--output", "f32", big)
    said = shards(*args, status=4, preexec_fn=lambda: limit(300))
    assert summary(said)[:4] == (1, 0, 0, 1) and not list(out.iterdir())


# ---- several processes, and kills ---------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4])
def test_processes_at_once_make_each_shard_once(n, tmp_path):
    paths, out = write_files(tmp_path / "in", 40), tmp_path / "out"
    runs = [start("--out", out, *paths) for _ in range(n)]
    said = [p.communicate(timeout=GUARD)[1].decode() for p in runs]
    assert [p.returncode for p in runs] == [0] * n, said
    sums = [summary(s) for s in said]
    assert all(s[0] == 40 and s[1] + s[2] == 40 and s[4] == sums[0][4] for s in sums)
    assert sum(s[1] for s in sums) == 40
    check_all(out, paths)


def in_work(out):
    return [p.name for p in out.glob(".*.part")] if out.exists() else []


def handles(process, sig):
    """Whether a process has a handler of its own for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
    return int(caught, 16) >> (sig - 1) & 1


def test_kills_lose_at_most_the_shard_in_work(tmp_path):
    """Killed whenever a few shards are done, until all are there."""
    paths, out = write_files(tmp_path / "in", 30), tmp_path / "out"
    kills, done = 0, 0
    finals = lambda: {p: p.read_bytes() for p in out.glob("[!.]*.jsonl")} if out.exists() else {}
    while True:
        before = finals()
        p = start("--out", out, "--batch-tokens", 16, *paths)
        wait_for(lambda: p.poll() is not None or (len(finals()) >= done + 5 and in_work(out)))
        p.kill()
        p.communicate()
        for path, data in finals().items():
            source = tmp_path / "in" / path.name.removesuffix(".jsonl")
            assert data == pipe(source.read_bytes())
        assert finals().items() >= before.items()
        if p.returncode == 0 and kills >= 3:
            break
        if p.returncode == 0:  # it was faster than this test
            shutil.rmtree(out)
            done = 0
            continue
        kills, done = kills + 1, len(finals())
        assert p.returncode == -signal.SIGKILL and len(in_work(out)) <= 1
    shards("--out", out, *paths)
    check_all(out, paths)


def test_a_killed_process_blocks_nobody(tmp_path):
    """One waits for a shard that another has; the other is killed; the first one makes it."""
    paths, out = write_files(tmp_path / "in", 2), tmp_path / "out"
    paths[0].write_bytes(b"".join(b"%d %s\n" % (i, b"w " * 500) for i in range(2000)))
    first = start("--out", out, paths[0])
    wait_for(lambda: in_work(out))
    second = start("--out", out, *paths)
    wait_for(lambda: (out / f"{paths[1].name}.json").exists())
    assert second.poll() is None and len(in_work(out)) == 1
    paths[0].write_bytes(b"short now\n")
    first.kill()
    first.communicate()
    said = second.communicate(timeout=GUARD)[1].decode()
    assert second.returncode == 0 and summary(said)[:4] == (2, 2, 0, 0)
    check_all(out, paths)


@pytest.mark.parametrize("change", ["grown", "shorter", "rewritten"])
def test_an_input_that_changes_while_it_is_read(change, tmp_path):
    """Its rows would be of two inputs, or its last one half a line."""
    paths, out = write_files(tmp_path / "in", 2), tmp_path / "out"
    lines = b"".join(b"%05d %s\n" % (i, b"w " * 500) for i in range(30 if SANITIZED else 600))
    paths[0].write_bytes(lines)
    p = start("--out", out, *paths)
    wait_for(lambda: in_work(out))
    p.send_signal(signal.SIGSTOP)
    with open(paths[0], "r+b") as f:
        if change == "grown":
            f.seek(0, 2)
            f.write(b"half of a li")
        elif change == "shorter":
            f.truncate(20000)
        else:
            f.write(lines[::-1])
    p.send_signal(signal.SIGCONT)
    said = p.communicate(timeout=GUARD)[1].decode()
    assert p.returncode == 1 and f"{paths[0]}: cannot read (it was changed meanwhile)" in said
    assert summary(said)[:4] == (2, 1, 0, 1) and not (out / f"{paths[0].name}.json").exists()
    check_all(out, paths[1:])


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_up_the_shard_in_work(sig, tmp_path):
    paths, out = write_files(tmp_path / "in", 3), tmp_path / "out"
    paths[1].write_bytes(b"".join(b"%d %s\n" % (i, b"w " * 500) for i in range(2000)))
    p = start("--out", out, *paths)
    wait_for(lambda: (out / f"{paths[0].name}.json").exists() and in_work(out))
    p.send_signal(sig)
    said = p.communicate(timeout=GUARD)[1].decode()
    assert p.returncode == -sig
    assert summary(said)[:4] == (3, 1, 0, 0) and "stopped by a signal" in said
    check_all(out, paths[:1])


def test_a_signal_ends_the_wait_for_another_process(tmp_path):
    paths, out = write_files(tmp_path / "in", 1), tmp_path / "out"
    paths[0].write_bytes(b"".join(b"%d %s\n" % (i, b"w " * 500) for i in range(2000)))
    first = start("--out", out, *paths)
    wait_for(lambda: in_work(out))
    second = start("--out", out, *paths)
    wait_for(lambda: handles(second, signal.SIGTERM))
    time.sleep(0.3)  # until it waits; a signal before that ends it alike
    second.terminate()
    assert summary(second.communicate(timeout=GUARD)[1].decode())[:4] == (1, 0, 0, 0)
    assert second.returncode == -signal.SIGTERM and len(in_work(out)) == 1
    first.kill()
    first.communicate()


def test_what_dead_processes_left_is_removed(files, tmp_path):
    """Of this host and this shard, if the lock tells that its holder died; nothing of other hosts,
    whose locks may not reach here."""
    out, host, name = tmp_path / "out", os.uname().nodename, files[0].name
    out.mkdir()
    stale = [
        out / f".{name}.{host}.4194304-0123abcd.part",
        out / f".{name}.{host}.{os.getpid()}-0123abcd.part",  # the id is used again
        out / f".{name}.lock",
    ]
    others = [
        out / f".{name}.other-{host}.77-0123abcd.part",
        out / f".{files[1].name}x.{host}.77-0123abcd.part",
        out / f".{name}.{host}.77-0123abcd.part.old",
        out / f".{name}.{host}.77-0123abc.part",
        out / f".{name}.{host}.-0123abcd.part",
    ]
    for there in (0, 4):  # also if the shard is whole
        for path in (*stale, *others):
            path.write_bytes(b"x")
        assert summary(shards("--out", out, *files))[2] == there
        assert not any(p.exists() for p in stale) and all(p.exists() for p in others)


def preloaded(tmp_path, source):
    """The environment in which functions of C source replace the C library's."""
    if SANITIZED:
        pytest.skip("a sanitizer has to be the first library, and so a preloaded one cannot be")
    (tmp_path / "preloaded.c").write_text(source)
    library = tmp_path / "preloaded.so"
    build = ["gcc", "-shared", "-fPIC", tmp_path / "preloaded.c", "-o", library]
    subprocess.run(build, check=True)
    return {**os.environ, "LD_PRELOAD": str(library)}


KILL_AT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
static void count(void) {
    static int calls;
    if (++calls == atoi(getenv("KILL_AT"))) raise(SIGKILL);
}
int renameat(int a, const char *b, int c, const char *d) {
    count();
    int (*real)(int, const char *, int, const char *) = dlsym(RTLD_NEXT, "renameat");
    return real(a, b, c, d);
}
int unlinkat(int a, const char *b, int c) {
    count();
    int (*real)(int, const char *, int) = dlsym(RTLD_NEXT, "unlinkat");
    return real(a, b, c);
}
int fsync(int a) {
    count();
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return real(a);
}
"""


def test_a_kill_at_any_step(tmp_path):
    """Between any two steps on the directory: no output is taken for one of other options."""
    paths, out = write_files(tmp_path / "in", 1), tmp_path / "out"
    env = preloaded(tmp_path, KILL_AT)
    kills = 0
    while True:
        shards("--out", out, *paths)
        p = start("--out", out, "--query", *paths, env={**env, "KILL_AT": str(kills + 1)})
        p.communicate(timeout=GUARD)
        if p.returncode == 0:
            break
        assert p.returncode == -signal.SIGKILL
        kills += 1
        for args in ((), ("--query",)):
            shards("--out", out, *args, *paths)
            check_all(out, paths, *args)
    # two renames, an unlink of the old JSON and one of the lock; each file and each step is synced
    assert kills == 9
    check_all(out, paths, "--query")


NO_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
static int without(const char *name, int fd, int cmd, void *arg) {
    int (*real)(int, int, ...) = (int (*)(int, int, ...))dlsym(RTLD_NEXT, name);
    if (cmd == F_OFD_SETLK) return errno = ENOLCK, -1;
    return real(fd, cmd, arg);
}
#define DEFINE(name) \\
    int name(int fd, int cmd, ...) { \\
        va_list ap; va_start(ap, cmd); void *arg = va_arg(ap, void *); va_end(ap); \\
        return without(#name, fd, cmd, arg); \\
    }
DEFINE(fcntl)
DEFINE(fcntl64)
"""


def test_without_locks_work_is_done_twice_but_right(tmp_path):
    paths, out = write_files(tmp_path / "in", 20), tmp_path / "out"
    env = preloaded(tmp_path, NO_LOCKS)
    runs = [start("--out", out, *paths, env=env) for _ in range(3)]
    said = [p.communicate(timeout=GUARD)[1].decode() for p in runs]
    assert [p.returncode for p in runs] == [0] * 3, said
    for s in said:
        assert s.count("no locks here (No locks available)") == 1 and s.count("\n") == 2
        assert summary(s)[0] == summary(s)[1] + summary(s)[2] == 20
    check_all(out, paths)


SHORT = """
#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>
ssize_t pwrite(int fd, const void *p, size_t n, off_t at) {
    (void)fd; (void)p; (void)at;
    return (ssize_t)n - 1;
}
"""


def test_a_header_that_is_not_whole_is_an_error(files, tmp_path):
    out = tmp_path / "out"
    said = shards("--out", out, "--output", "npy", files[0], status=4,
                  env=preloaded(tmp_path, SHORT))
    assert f"{out}: cannot write the output of {files[0]} (Input/output error)\n" in said
    assert not list(out.iterdir())


LATE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>
static int late(const char *name, int fd, int cmd, void *arg) {
    int (*real)(int, int, ...) = (int (*)(int, int, ...))dlsym(RTLD_NEXT, name);
    static int locks;
    if (cmd == F_OFD_SETLK && !locks++) {
        unlink(getenv("LOCK"));
        while (access(getenv("GO"), F_OK)) usleep(1000);
    } else if (cmd == F_OFD_SETLK) {
        close(open(getenv("AGAIN"), O_WRONLY | O_CREAT, 0666));
    }
    return real(fd, cmd, arg);
}
#define DEFINE(name) \\
    int name(int fd, int cmd, ...) { \\
        va_list ap; va_start(ap, cmd); void *arg = va_arg(ap, void *); va_end(ap); \\
        return late(#name, fd, cmd, arg); \\
    }
DEFINE(fcntl)
DEFINE(fcntl64)
"""


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path):
    """One opens the file of a lock, whose holder removes it; another makes it and is at work. The
    first one must not think that it has the shard, and that the other's part is of a dead one."""
    (path,), out = write_files(tmp_path / "in", 1), tmp_path / "out"
    path.write_bytes(b"".join(b"%d %s\n" % (i, b"w " * 100) for i in range(500)))
    out.mkdir()
    names = {"LOCK": out / f".{path.name}.lock", "GO": tmp_path / "go", "AGAIN": tmp_path / "again"}
    names["LOCK"].touch()
    env = {**preloaded(tmp_path, LATE), **{k: str(v) for k, v in names.items()}}
    first = start("--out", out, path, env=env)
    wait_for(lambda: not names["LOCK"].exists())
    second = start("--out", out, path)
    wait_for(lambda: in_work(out))
    second.send_signal(signal.SIGSTOP)
    part = in_work(out)
    names["GO"].touch()
    wait_for(lambda: names["AGAIN"].exists() or first.poll() is not None)
    there = in_work(out)
    second.send_signal(signal.SIGCONT)
    said = [p.communicate(timeout=GUARD)[1].decode() for p in (first, second)]
    assert there == part and [p.returncode for p in (first, second)] == [0, 0], said
    assert [summary(s)[1] for s in said] == [0, 1]
    check_all(out, [path])


def test_progress_and_stats(files, tmp_path):
    said = shards("--out", tmp_path / "out", "--stats", "--progress", *files)
    assert re.search(r"\r\x1b\[Kshard 1 of 4: \d+ texts, \d+ tokens/s", said)
    assert re.search(r"shard 1 of 4: .*, 2\d %, ETA ", said)
    assert re.search(r"qemb: 83 texts, \d+ tokens in ", said)
    assert re.search(r" 0 errors, 83 rows, peak memory", said)
