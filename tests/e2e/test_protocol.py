"""The command line and the line protocol: ./qemb, run with pipes as a user does.

QEMB_BIN names the program (default ./qemb), for example one with sanitizers, whose reports show
as a wrong exit status.
"""

import base64
import contextlib
import fcntl
import gzip
import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import hf_fixture as hf
import numpy as np
import pytest
import zstandard
from edit_qemb import Qemb, checksum
from helpers import (GUARD, QEMB, ROOT, is_sanitized, jsonl, read_line, stdout_of, tables,
                     wait_for)

MODEL = str(ROOT / "tests" / "fixtures" / "small.qemb")
HIDDEN, MAX_TOKENS, EOS, VOCAB = 128, 2048, 2557, 2560
SANITIZED = is_sanitized(QEMB)

TEXTS = [
    "A list of numbers.",
    "",
    "two",
    "two",
    "Zwölf Boxkämpfer",
    "中文",
    "nul \0 inside",
    "  spaces  ",
    "A list of words.",
    "a" * 40,
    "😀",
    "last",
]


def lines(texts):
    return "".join(t + "\n" for t in texts).encode()


def qemb(*args, data=b"", model=True, **kw):
    """The finished process; data goes to its stdin."""
    text = lambda a: a if isinstance(a, bytes) else str(a)
    command = [QEMB, *(["-m", MODEL] if model else []), *map(text, args)]
    if "stdin" not in kw:
        kw["input"] = data
    kw.setdefault("stdout", subprocess.PIPE)
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=GUARD, **kw)


def out(*args, status=0, errors=None, **kw):
    """stdout of a run that must end with that status; stderr must be empty or match errors."""
    return stdout_of(qemb(*args, **kw), status, errors)


def vectors(*args, data=b"", **kw):
    """JSON lines -> list of float32 arrays."""
    return [np.array(json.loads(l), "<f4") for l in out(*args, data=data, **kw).splitlines()]


def objects(*args, data=b"", **kw):
    return [json.loads(l) for l in out(*args, data=data, **kw).splitlines()]


@pytest.fixture(scope="module")
def alone():
    """Returns the output for each of TEXTS, each from a separate process."""
    return [out(data=lines([t])) for t in TEXTS]


# ---- records in --------------------------------------------------------------------------------


def test_one_record_out_per_record_in(alone):
    assert out(data=lines(TEXTS)) == b"".join(alone)


def test_vectors_are_unit_length_and_differ(alone):
    v = np.array([json.loads(a) for a in alone])
    assert v.shape == (len(TEXTS), HIDDEN)
    # a sum of 128 squares of rounded floats
    assert np.all(np.abs(np.linalg.norm(v, axis=1) - 1) < HIDDEN * 2.0**-24)
    assert len({a for a in alone}) == len(set(TEXTS))


def test_ends_of_lines(alone):
    one, empty, two = alone[0], alone[1], alone[2]
    text = TEXTS[0].encode()
    assert out(data=text) == one
    assert out(data=text + b"\r\n") == one
    assert out(data=text + b"\r") == one
    assert out(data=b"\n") == empty
    assert out(data=b"\r\n\ntwo") == empty + empty + two
    assert out(data=b"") == b""
    assert out(data=text + b"\r\r\n") != one


def test_null_separated(alone):
    assert out("-0", data=TEXTS[0].encode() + b"\0\0two") == alone[0] + alone[1] + alone[2]
    a, b = objects("tokenize", "--null", data=b"two\nlines\0cr\r")
    assert (a, b) != tuple(objects("tokenize", data=b"two\nlines"))
    assert b == objects("tokenize", "--input", "jsonl", data=jsonl({"text": "cr\r"}))[0]
    assert a == objects("tokenize", "--input", "jsonl", data=jsonl({"text": "two\nlines"}))[0]


def test_nul_bytes_count():
    assert out(data=b"a\0b\n") != out(data=b"a\n")
    assert objects("tokenize", data=b"a\0b")[0] != objects("tokenize", data=b"ab")[0]


def test_packed_is_alone_for_any_batch_and_threads(alone):
    for budget, threads in ((1, 2), (7, 1), (7, 2), (64, 3), (4096, 1), (4096, 2)):
        got = out("--batch-tokens", budget, "--threads", threads, data=lines(TEXTS))
        assert got == b"".join(alone), (budget, threads)


def test_packed_is_alone_for_any_cut_of_stdin(alone):
    data, want = lines(TEXTS), b"".join(alone)
    rng = random.Random(1)
    for cuts in (len(data) - 1, 40, 12, 3):
        places = sorted(rng.sample(range(1, len(data)), cuts)) + [len(data)]
        p = start()
        before = 0
        for place in places:
            p.stdin.write(data[before:place])
            before = place
        assert finish(p) == want


def start(*args, **kw):
    command = [QEMB, "-m", MODEL, *map(str, args)]
    kw.setdefault("stdin", subprocess.PIPE)
    kw.setdefault("stdout", subprocess.PIPE)
    return subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0, **kw)


def finish(p, status=0):
    """Closes stdin and returns the rest of stdout."""
    rest, err = p.communicate(timeout=GUARD)
    assert p.returncode == status, err.decode()
    return rest


def test_coprocess_gets_its_answer_at_once(alone):
    p = start()
    for i in (0, 1, 2, 3, 11):
        p.stdin.write(lines([TEXTS[i]]))
        assert read_line(p) == alone[i]
    p.stdin.write(TEXTS[0].encode()[:5])
    p.stdin.write(TEXTS[0].encode()[5:] + b"\n" + b"two\n")
    got = read_line(p)
    while got.count(b"\n") < 2:
        got += read_line(p)
    assert got == alone[0] + alone[2]
    p.stdin.write(b"last")
    assert finish(p) == alone[11]


def test_coprocess_of_errors_and_tokens():
    p = start("--input", "jsonl")
    p.stdin.write(b"oops\n")
    assert json.loads(read_line(p))["error"]["code"] == "invalid_json"
    p.stdin.write(b'{"text":"x"}\n')
    assert len(json.loads(read_line(p))) == HIDDEN
    finish(p, 3)
    p = subprocess.Popen(
        [QEMB, "tokenize", "-m", MODEL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    p.stdin.write(b"\n")
    assert json.loads(read_line(p)) == [EOS]
    assert finish(p) == b""


def test_yes_head_cut(alone):
    shell = f"yes | head -n 100000 | cut -c1-40 | {QEMB} -m {MODEL} --dim 2 --output f32"
    p = subprocess.run(["sh", "-c", shell], stdout=subprocess.PIPE, timeout=GUARD)
    assert p.returncode == 0 and len(p.stdout) == 100000 * 8
    one = out("--dim", 2, "--output", "f32", data=b"y\n")
    assert p.stdout == one * 100000


def test_order_with_errors_between():
    rng = random.Random(2)
    records = []
    for i in range(150):
        if rng.random() < 0.3:
            records.append(b"bad \xff")
        else:
            records.append(b"x" * rng.randrange(12))
    got = objects(
        "--output",
        "jsonl",
        "--dim",
        1,
        "--batch-tokens",
        50,
        data=b"\n".join(records) + b"\n",
        status=3,
        errors="of 150 records failed",
    )
    assert [g["id"] for g in got] == list(range(1, 151))
    for g, r in zip(got, records):
        assert ("error" in g) == (b"\xff" in r)
        assert ("embedding" in g) != (b"\xff" in r)


def packings(data):
    """The same bytes as .gz and as .zst: one member, several, empty ones between."""
    cut = len(data) // 3
    parts = [data[:cut], b"", data[cut:]]
    zst = zstandard.ZstdCompressor().compress
    for pack in (gzip.compress, zst):
        yield pack(data)
        yield b"".join(map(pack, parts))


def test_compressed_input(alone, tmp_path):
    data, want = lines(TEXTS), b"".join(alone)
    for packed in packings(data):
        assert out(data=packed) == want
        assert objects("tokenize", data=packed) == objects("tokenize", data=data)
        p = start()  # a few bytes at a time
        for i in range(0, len(packed), 5):
            p.stdin.write(packed[i : i + 5])
        assert finish(p) == want
        path = tmp_path / "packed"
        path.write_bytes(packed)
        with open(path, "rb") as f:
            said = qemb("--progress", stdin=f).stderr
        assert re.search(rb"100 %, ETA 0:00:00", said), said


def test_compressed_input_that_is_cut_or_damaged(alone):
    """What was whole is answered; the status is that of a read that failed."""
    data = lines(TEXTS[:3])
    for packed in packings(data):
        whole = packed + packed
        for bad, why in (
            (whole[:-3], "compressed data: cut off"),
            (packed + b"text\n", "(gzip|zstd): damaged: "),
        ):
            got = out(data=bad, status=1, errors=rf"^qemb: standard input: cannot read \({why}")
            assert got.startswith(b"".join(alone[:3]))
            p = qemb("tokenize", data=bad)
            assert p.returncode == 1 and p.stdout.count(b"\n") >= 3
    # a whole zstd frame whose window is of 256 MiB (RFC 8878: 2 to the power of 10 + 18)
    wide = b"\x28\xb5\x2f\xfd\x00" + bytes([18 << 3]) + b"\x11\x00\x00a\n"
    why = r"zstd: its window is too large \(want at most 128 MiB\)"
    assert not out(data=wide, status=1, errors=rf"^qemb: standard input: cannot read \({why}\)")
    # no more than a magic's first bytes: texts
    for text in (b"\x1f\x8b", b"(", b"(\xb5"):
        assert qemb(data=text).stdout.count(b"\n") == 1


def test_a_line_of_100_megabytes(alone, tmp_path):
    path = tmp_path / "big"
    with open(path, "wb") as f:
        f.write(b"two\n")
        for _ in range(100):
            f.write(b"word and " * 116508 + b"word")
        f.write(b"\nlast\n")
    with open(path, "rb") as f:
        got = out(stdin=f, status=3, errors="1 of 3 records failed").splitlines(keepends=True)
    assert (got[0], got[2]) == (alone[2], alone[11])
    assert json.loads(got[1])["error"]["code"] == "too_long"
    with open(path, "rb") as f:
        got = objects("--truncate", "--output", "jsonl", "--dim", 3, "--max-tokens", 20, stdin=f)
    assert got[1]["tokens"] == 20 and 104_000_000 < got[1]["truncated_bytes"] < 105_000_000
    assert "truncated_bytes" not in got[0] and "truncated_bytes" not in got[2]


def test_floods_are_written_in_bounded_memory(tmp_path):
    """Blank lines, errors, repeats: more records than fit in a window, all ready."""

    def peak(n):
        path = tmp_path / "flood"
        path.write_bytes(b"\n\xff\nab\n" * n)
        with open(path, "rb") as f:
            p = qemb("--dim", 1, "--stats", "--on-error", "skip", stdin=f)
        assert p.returncode == 3 and p.stdout.count(b"\n") == 2 * n
        return float(re.search(r"peak memory ([0-9.]+) MiB", p.stderr.decode())[1])

    small, large = peak(30_000), peak(120_000)
    assert SANITIZED or large < small + 8


def test_backpressure():
    """If stdout is not read, qemb stops reading its input, long before 100 MB."""
    p = start()
    fd = p.stdin.fileno()
    os.set_blocking(fd, False)
    sent, refused_since = 0, None
    while sent < 100_000_000:
        try:
            sent += os.write(fd, b"ab\n" * 20000)
            refused_since = None
        except BlockingIOError:
            refused_since = refused_since or time.monotonic()
            if time.monotonic() - refused_since > 1:
                break
            time.sleep(0.01)
    assert sent < 8_000_000
    p.kill()
    p.communicate()


# ---- limits ------------------------------------------------------------------------------------


def test_too_long_is_an_error_and_its_neighbours_are_not(alone):
    exact = b"z " * 3000
    ids = objects("tokenize", "--truncate", data=exact)[0]
    assert len(ids) == MAX_TOKENS and ids[-1] == EOS and EOS not in ids[:-1]
    got = out(data=b"two\n" + exact + b"\nlast\n", status=3, errors="1 of 3").splitlines(True)
    assert (got[0], got[2]) == (alone[2], alone[11])
    error = json.loads(got[1])
    assert error["id"] == 2 and error["line"] == 2 and error["error"]["code"] == "too_long"
    assert "2048" in error["error"]["message"]


def test_max_tokens_border():
    text = b"abc abd abe abf"
    n = len(objects("tokenize", data=text)[0])
    full = out(data=text)
    assert out("--max-tokens", n, data=text) == full
    cut = ("--max-tokens", n - 1)
    refused = json.loads(out(*cut, data=text, status=3, errors="1 of 1"))
    assert refused["error"]["code"] == "too_long"
    assert out(*cut, "--truncate", data=text) != full
    assert objects("tokenize", *cut, "--truncate", data=text)[0] == objects("tokenize", data=text)[
        0
    ][: n - 2] + [EOS]
    assert objects("tokenize", "--max-tokens", 1, "--truncate", data=text) == [[EOS]]
    assert out("--max-tokens", 1, "--truncate", data=text) == out(data=b"\n")


def test_a_text_longer_than_the_batch_goes_alone(alone):
    data = lines(["w " * 20, "two", "v " * 20])
    assert out("--batch-tokens", 10, data=data) == out(data=data)


def test_truncated_bytes_and_tokens():
    text = "one two three four five six"
    data = jsonl({"text": text}, {"ids": [1, 2, 3, 4, 5, 6, EOS]}, {"ids": [1, 2, 3, 4]})
    args = ("--truncate", "--max-tokens", 5)
    got = objects(*args, "--output", "jsonl", "--input", "jsonl", data=data)
    kept = objects("tokenize", *args, data=text.encode())[0]
    short = text[: len(text) - got[0]["truncated_bytes"]]
    assert objects("tokenize", data=short.encode())[0] == kept
    assert got[1]["truncated_tokens"] == 2 and "truncated_bytes" not in got[1]
    assert "truncated_tokens" not in got[2] and got[2]["tokens"] == 5
    assert all(g["tokens"] == 5 for g in got)


def test_invalid_utf8_names_the_byte():
    for args in ((), ("--query",), ("--instruct", "a long task, so that offsets would differ")):
        got = objects(*args, data=b"fine\nab\xffcd\n\xc3", status=3, errors="2 of 3 records")
        assert len(got[0]) == HIDDEN
        assert [g["error"]["code"] for g in got[1:]] == ["invalid_utf8"] * 2
        assert "byte 2 " in got[1]["error"]["message"] and "byte 0 " in got[2]["error"]["message"]


# ---- prompts -----------------------------------------------------------------------------------

TASK = "Given a web search query, retrieve relevant passages that answer the query"


def test_query_and_instruct():
    joined = f"Instruct: {TASK}\nQuery:What is it?".encode()
    want = out("-0", data=joined)
    assert out("--query", data=b"What is it?\n") == want
    assert out("--instruct", TASK, data=b"What is it?\n") == want
    assert out("--instruct", "other", data=b"What is it?\n") != want
    ids = objects("tokenize", "-0", data=joined)
    assert objects("tokenize", "--query", data=b"What is it?") == ids


def test_instruct_of_a_record():
    record = lambda **kw: jsonl({"text": "What is it?", **kw})
    query, plain = out("--query", data=b"What is it?"), out(data=b"What is it?")
    assert query != plain
    for args in ((), ("--instruct", "something else"), ("--query",)):
        assert out("--input", "jsonl", *args, data=record(instruct=TASK)) == query
        assert out("--input", "jsonl", *args, data=record(instruct="")) == plain
        assert out("--input", "jsonl", *args, data=record(instruct=None)) == plain
    assert out("--input", "jsonl", "--query", data=record()) == query
    assert out("--input", "jsonl", data=record()) == plain


def test_shared_prefix_is_computed_once_and_changes_nothing():
    texts = [f"What is number {i}?" for i in range(4)]
    p = qemb("--query", "--stats", data=lines(texts))
    assert p.stdout == b"".join(out("--query", data=lines([t])) for t in texts)
    prompt = len(objects("tokenize", "--query", data=b"\n")[0]) - 3
    assert int(re.search(r"(\d+) prefix tokens saved", p.stderr.decode())[1]) >= prompt * 3


# ---- JSON lines --------------------------------------------------------------------------------


def test_jsonl_equals_text(alone):
    data = jsonl(*[{"text": t} for t in TEXTS])
    assert out("--input", "jsonl", data=data) == b"".join(alone)
    assert out("--input", "jsonl", data=data.replace(b"\n", b"\r\n")) == b"".join(alone)
    assert out("--input", "jsonl", "-0", data=data.replace(b"\n", b"\0")) == b"".join(alone)


def test_ids():
    ids = objects("tokenize", data=b"A list")[0]
    want = out(data=b"A list")
    assert ids[-1] == EOS
    for form in (ids, ids[:-1]):
        assert out("--input", "jsonl", data=jsonl({"ids": form})) == want
        assert out("--input", "jsonl", "--query", data=jsonl({"ids": form})) == want
        assert objects("tokenize", "--input", "jsonl", data=jsonl({"ids": form})) == [ids]
    assert out("--input", "jsonl", data=jsonl({"ids": []}, {"ids": [EOS]})) == 2 * out(data=b"\n")
    for given, want in ((ids + [EOS], ids + [EOS]), ([EOS, 1], [EOS, 1, EOS])):
        assert objects("tokenize", "--input", "jsonl", data=jsonl({"ids": given})) == [want]


def test_ids_that_are_too_many():
    most = [7] * 29
    data = jsonl(
        {"ids": most}, {"ids": most + [EOS]}, {"ids": most + [7]}, {"ids": most + [7, EOS]}
    )
    got = objects(
        "--max-tokens",
        30,
        "--output",
        "jsonl",
        "--input",
        "jsonl",
        data=data,
        status=3,
        errors="2 of 4",
    )
    assert [g.get("tokens") for g in got] == [30, 30, None, None]
    assert got[0]["embedding"] == got[1]["embedding"]
    assert [g["error"]["code"] for g in got[2:]] == ["too_long"] * 2


def test_jsonl_output_ids():
    ids = ["s", 7, -1, 2.5, None, True, {"a": [1, {}]}, [], "ü\n\"\\\0", 2**63 - 1]
    data = jsonl(*[{"id": i, "text": "x"} for i in ids], {"text": "x"})
    got = objects("--input", "jsonl", "--output", "jsonl", data=data)
    assert [g["id"] for g in got] == ids + [len(ids) + 1]
    assert all(list(g) == ["id", "embedding", "tokens"] for g in got)
    assert [type(g["id"]) for g in got[:4]] == [str, int, int, float]


KEPT = [
    (
        '{"id":7,"lang":"de","text":"x", "n" : {"a": [1, "}"]} ,"f":1.50e3}',
        '"lang":"de","n":{"a": [1, "}"]},"f":1.50e3',
    ),
    ('{"text":"x","ü":"\\u00fc"}', '"ü":"\\u00fc"'),
    ('{"text":"x"}', ""),
    ('{"b":1,"text":5}', '"b":1'),
    ('{"b":1,"text":"x","embedding":5}', '"b":1'),
    ('{"b":1,"text":"x","error":5}', '"b":1'),
]


def test_keep():
    """Other keys come back as they came, behind the id, also of a record that failed."""
    data = jsonl(*[line for line, _ in KEPT], {"text": "last", "k": 1})
    args = ("--keep", "--input", "jsonl", "--output", "jsonl", "--batch-tokens", 8)
    got = out(*args, data=data, status=3, errors="3 of 7 records failed").decode().splitlines()
    plain = out("--output", "jsonl", data=b"x\n" * 3 + b"a\n" * 3 + b"last").decode().splitlines()
    assert len(got) == len(KEPT) + 1
    for i, (line, kept) in enumerate(KEPT):
        start = f'{{"id":{json.loads(line).get("id", i + 1)}' + (f",{kept}" if kept else "")
        if i < 3:
            assert got[i] == start + plain[i][plain[i].index(',"embedding"') :]
        else:
            assert got[i].startswith(f'{start},"line":{i + 1},"error":')
    for g, key in zip(got[4:6], ("embedding", "error")):
        assert f'"{key}": a key of the output' in json.loads(g)["error"]["message"]
    assert got[6].startswith('{"id":7,"k":1,"embedding":[')
    # without it, the message names it
    (e,) = objects("--input", "jsonl", data=b'{"text":"x","lang":"de"}', status=3, errors="1 of 1")
    assert '"lang": unknown key' in e["error"]["message"] and "--keep" in e["error"]["message"]
    # records on several lines stay lines
    many = b'{"text":"x","a":[1,\n2]}\0{"text":"x","b":{\n}}\0'
    got = objects(*args, "-0", data=many)
    assert [g.get("a", g.get("b")) for g in got] == [[1, 2], {}]


def test_dim_of_a_record():
    full = vectors(data=b"x")[0].astype(np.float64)
    got = vectors(
        "--input",
        "jsonl",
        "--dim",
        5,
        data=jsonl({"text": "x"}, *[{"text": "x", "dim": d} for d in (1, 64, HIDDEN)]),
    )
    assert [len(g) for g in got] == [5, 1, 64, HIDDEN]
    for g in got:
        want = full[: len(g)] / np.linalg.norm(full[: len(g)])
        # cut and scaled from vectors whose numbers differ by one rounding
        assert np.all(np.abs(g - want) <= 4 * 2.0**-24)
    assert np.array_equal(got[3], vectors(data=b"x")[0])


BAD = [
    ("", "invalid_json", None),
    ("   ", "invalid_json", None),
    ("{", "invalid_json", None),
    ("{} {}", "invalid_json", None),
    ("{'text':'x'}", "invalid_json", None),
    ('{"text":"\\ud800"}', "invalid_json", None),
    ("[]", "bad_record", None),
    ("3", "bad_record", None),
    ("{}", "bad_record", "line"),
    ('{"id":"k"}', "bad_record", "k"),
    ('{"id":"k","text":"a","text":"b"}', "bad_record", None),
    ('{"id":"k","text":"a","ids":[1]}', "bad_record", "k"),
    ('{"id":"k","text":5}', "bad_record", "k"),
    ('{"id":"k","text":"a","instuct":"typo"}', "bad_record", "k"),
    ('{"id":"k","ids":[1],"instruct":"x"}', "bad_record", "k"),
    ('{"id":"k","ids":[-1]}', "bad_ids", "k"),
    ('{"id":"k","ids":[%d]}' % VOCAB, "bad_ids", "k"),
    ('{"id":"k","ids":["1"]}', "bad_ids", "k"),
    ('{"id":"k","text":"a","dim":0}', "bad_dim", "k"),
    ('{"id":"k","text":"a","dim":%d}' % (HIDDEN + 1), "bad_dim", "k"),
    ('{"id":"k","text":"a","dim":"8"}', "bad_dim", "k"),
    ('{"id":"k","text":"%s"}' % ("z " * 3000), "too_long", "k"),
]


@pytest.mark.parametrize("kind", ["json", "jsonl", "tsv", "base64"])
def test_error_records(kind):
    data = b"".join(jsonl(line, {"text": "x"}) for line, _, _ in BAD)
    data += b'{"text":"\xff"}\n'
    got = out(
        "--input",
        "jsonl",
        "--output",
        kind,
        data=data,
        status=3,
        errors=f"^qemb: {len(BAD) + 1} of {2 * len(BAD) + 1} records failed\n$",
    ).splitlines()
    assert len(got) == 2 * len(BAD) + 1
    good = out("--input", "jsonl", "--output", kind, data=jsonl({"text": "x"})).rstrip(b"\n")
    for i, (line, code, key) in enumerate([*BAD, ("", "invalid_utf8", None)]):
        error = json.loads(got[2 * i])
        assert list(error) == ["id", "line", "error"] and error["line"] == 2 * i + 1
        assert error["error"]["code"] == code, (line, error)
        assert error["id"] == (2 * i + 1 if key == "line" else key), (line, error)
        assert error["error"]["message"]
        if i < len(BAD) and kind != "jsonl":
            assert got[2 * i + 1] == good


def test_non_finite_vectors_are_errors(tmp_path):
    """A model whose last norm is NaN: its vectors must not come out as numbers."""
    model = Qemb(MODEL)
    norm = bytearray(model.sections["final_norm"][4])
    struct.pack_into("<f", norm, 4 * 100, float("nan"))
    model.sections["final_norm"][4] = bytes(norm)
    path = model.write(tmp_path / "nan.qemb")
    got = objects("-m", path, model=False, data=b"a\nb\n", status=3, errors="2 of 2")
    assert [g["error"]["code"] for g in got] == ["non_finite"] * 2
    assert len(objects("-m", path, "--dim", 100, model=False, data=b"a\n")[0]) == 100
    zero = out(
        "-m",
        path,
        "--on-error",
        "zero",
        "--output",
        "f32",
        model=False,
        data=b"a\n",
        status=3,
        errors="record 1: non_finite: vector",
    )
    assert zero == bytes(4 * HIDDEN)


# ---- outputs -----------------------------------------------------------------------------------


def npy(data):
    return np.load(io.BytesIO(data), allow_pickle=False)


@pytest.mark.parametrize("dim", [7, HIDDEN])
def test_all_outputs_agree(dim):
    texts = TEXTS[:6]
    data = lines(texts)
    run = lambda kind: out("--dim", dim, "--output", kind, data=data)
    want = np.frombuffer(run("f32"), "<f4").reshape(len(texts), dim)
    same = lambda a: np.array_equal(np.asarray(a, "<f4").view("<u4"), want.view("<u4"))
    assert same([json.loads(l) for l in run("json").splitlines()])
    assert same([json.loads(l)["embedding"] for l in run("jsonl").splitlines()])
    assert same([[float(x) for x in l.split(b"\t")] for l in run("tsv").splitlines()])
    assert same(
        [
            np.frombuffer(base64.b64decode(l, validate=True), "<f4")
            for l in run("base64").splitlines()
        ]
    )
    assert same(npy(run("npy")))
    assert np.array_equal(np.frombuffer(run("f16"), "<f2").reshape(-1, dim), want.astype("<f2"))
    exact = want.astype(np.float64)
    exact = np.rint(127 * exact / np.abs(exact).max(axis=1, keepdims=True))
    assert np.array_equal(np.frombuffer(run("int8"), "i1").reshape(-1, dim), exact)
    bits = np.packbits(want > 0, axis=1)
    assert np.array_equal(np.frombuffer(run("binary"), "u1").reshape(len(texts), -1), bits)


def test_npy_everywhere(tmp_path):
    """A pipe, a new file, a file that is appended to, the middle of a file, no rows at all."""
    data = lines(TEXTS)
    piped = out("--output", "npy", data=data)
    assert npy(piped).shape == (len(TEXTS), HIDDEN)
    path = tmp_path / "v.npy"
    with open(path, "wb") as f:
        out("--output", "npy", data=data, stdout=f)
    assert path.read_bytes() == piped
    with open(path, "ab") as f:
        out("--output", "npy", data=data, stdout=f)
    assert path.read_bytes() == piped + piped
    with open(path, "wb") as f:
        f.write(b"before")
        f.flush()
        out("--output", "npy", data=data, stdout=f)
        f.write(b"after")
    assert path.read_bytes() == b"before" + piped + b"after"
    with open(path, "wb") as f:
        out("--output", "npy", stdout=f)
    assert npy(path.read_bytes()).shape == (0, HIDDEN)
    assert npy(out("--output", "npy", "--dim", 3)).shape == (0, 3)


def waiting_in(pipe):
    """How many bytes were written that nobody has read."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0]


def test_npy_of_a_killed_run_does_not_load(tmp_path):
    """In a file, zeros stand in place of the header until the end. A copy out of the temporary file
    that is cut off has fewer numbers than its header says."""
    with open(tmp_path / "v.npy", "w+b") as f:
        p = start("--output", "npy", stdout=f)
        p.stdin.write(b"two\n")
        wait_for(lambda: os.fstat(f.fileno()).st_size > 128)
        p.kill()
        p.communicate()
        f.seek(0)
        got = f.read()
        assert len(got) == 128 + 4 * HIDDEN and got[:128] == bytes(128)
    with pytest.raises(ValueError):
        np.load(tmp_path / "v.npy")
    # the copy has begun, and a full pipe holds it up
    p = start("--output", "npy")
    p.stdin.write(lines(["two"] * 1000))
    p.stdin.close()
    wait_for(lambda: waiting_in(p.stdout) >= 60000)
    p.kill()
    (tmp_path / "v.npy").write_bytes(p.stdout.read())
    p.wait(GUARD)
    with pytest.raises(ValueError):
        np.load(tmp_path / "v.npy")


@pytest.mark.parametrize("kind", ["f32", "f16", "npy", "int8", "binary"])
def test_binary_outputs_have_one_dim(kind):
    data = jsonl({"text": "a", "dim": 4}, {"text": "a"}, {"id": "k", "text": "a", "dim": 5})
    args = ("--input", "jsonl", "--dim", 4, "--output", kind)
    got = out(*args, data=data, status=3, errors='record 3: bad_dim: "dim".*got 5, want 4')
    assert got == out(*args, data=jsonl({"text": "a"}, {"text": "a"}))


@pytest.mark.parametrize("kind", ["f32", "f16", "npy", "int8", "binary"])
def test_on_error_in_binary(kind, tmp_path):
    data = b"one\n\xff\ntwo\n"
    args = ("--output", kind, "--dim", 4)
    one, two = (out(*args, data=t) for t in (b"one", b"two"))
    for stdout in (subprocess.PIPE, open(tmp_path / "out", "w+b")):

        def run(*more):
            goes_on = {"skip", "zero"} & {*more}
            how = "" if goes_on else r"; stops here \(--on-error zero or skip goes on\)"
            message = rf"^qemb: record 2: invalid_utf8: [^;\n]*{how}\n"
            message += r"qemb: 1 of \d records failed\n$"
            if stdout is subprocess.PIPE:
                return out(*args, *more, data=data, status=3, errors=message)
            stdout.seek(0)
            stdout.truncate()
            out(*args, *more, data=data, status=3, errors=message, stdout=stdout)
            stdout.seek(0)
            return stdout.read()

        if kind != "npy":
            assert run() == run("--on-error", "stop") == one
            assert run("--on-error", "skip") == one + two
            assert run("--on-error", "zero") == one + bytes(len(one)) + two
        else:
            assert run() == run("--on-error", "stop") == one
            assert np.array_equal(npy(run("--on-error", "skip")), np.vstack([npy(one), npy(two)]))
            assert np.array_equal(
                npy(run("--on-error", "zero")), np.vstack([npy(one), np.zeros((1, 4)), npy(two)])
            )


def test_on_error_in_text():
    data, args = b"one\n\xff\ntwo\n", ("--dim", 2)
    one, two = out(*args, data=b"one"), out(*args, data=b"two")
    message = "^qemb: record 2: invalid_utf8: "
    skip = out(*args, "--on-error", "skip", data=data, status=3, errors=message)
    assert skip == one + two
    zero = out(*args, "--on-error", "zero", data=data, status=3, errors=message)
    assert zero == one + b"[0.0,0.0]\n" + two
    assert out(*args, "--on-error", "stop", data=data, status=3, errors=message) == one
    got = out(*args, "--on-error", "record", data=data, status=3, errors="1 of 3").splitlines(True)
    assert (got[0], got[2]) == (one, two)


@pytest.mark.parametrize(
    "args",
    [(), ("--on-error", "skip"), ("--on-error", "zero"), ("--output", "npy", "--on-error", "zero")],
)
def test_errors_ok(args):
    """The same output and messages; the exit status is 0."""
    data = b"one\n\xff\ntwo\n"
    want, got = qemb(*args, data=data), qemb(*args, "--errors-ok", data=data)
    assert (want.returncode, got.returncode) == (3, 0)
    assert got.stdout == want.stdout and got.stderr == want.stderr
    fd = os.open("/", os.O_RDONLY)  # other failures are failures still
    out(*args, "--errors-ok", stdin=fd, status=1, errors="cannot read")
    os.close(fd)


def test_many_errors_are_named_ten_times():
    p = qemb("--on-error", "skip", data=b"\xff\n" * 50)
    assert p.returncode == 3 and p.stderr.count(b"\n") == 11
    assert b"record 10:" in p.stderr and b"record 11:" not in p.stderr
    assert p.stderr.endswith(b"qemb: 50 of 50 records failed\n")


# ---- end of a run ------------------------------------------------------------------------------


def test_head_closes_the_pipe(alone):
    """With an endless input, qemb ends without a message when the output is closed."""
    shell = f"(yes; true) | {{ {QEMB} -m {MODEL}; echo status $? >&2; }} | head -n 1"
    p = subprocess.run(
        ["bash", "-c", shell], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=GUARD
    )
    assert p.stdout.count(b"\n") == 1 and len(json.loads(p.stdout)) == HIDDEN
    assert p.stderr == b"status 4\n"


@pytest.mark.parametrize("kind", ["json", "f32", "npy"])
def test_dev_full(kind):
    with open("/dev/full", "wb") as full:
        out(
            "--output",
            kind,
            data=b"x\n",
            stdout=full,
            status=4,
            errors=r"^qemb: standard output: cannot write \(No space left on device\); "
                   r"0 rows are whole, the first 0 bytes\n$",
        )
    for args in (("--help",), ("info",), ("plan",), ("tokenize",), ("check",)):
        with open("/dev/full", "wb") as full:
            out(*args, data=b"x\n", stdout=full, status=4, errors="cannot write")


def test_closed_descriptors(alone):
    def shell(redirect, command=""):
        return subprocess.run(
            ["sh", "-c", f"echo two | {QEMB} {command} -m {MODEL} {redirect}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=GUARD,
        )

    p = shell(">&-")
    assert p.returncode == 4 and p.stderr == b"qemb: standard output: closed\n"
    for command in ("", "tokenize"):
        p = shell("<&-", command)
        assert p.returncode == 1 and p.stderr == b"qemb: standard input: closed\n"
    assert shell("<&-", "info").returncode == 0
    p = shell("2>&-")
    assert p.returncode == 0 and p.stdout == alone[2]


def test_unreadable_input():
    for command in ((), ("tokenize",)):
        fd = os.open("/", os.O_RDONLY)
        out(
            *command,
            stdin=fd,
            status=1,
            errors=r"^qemb: standard input: cannot read \(Is a directory\)\n$",
        )
        os.close(fd)


def test_sigterm_finishes_what_was_taken():
    texts = [f"text number {i}" for i in range(3000)]
    p = start("--batch-tokens", 16)
    feeder = threading.Thread(target=feed, args=(p, lines(texts)))
    feeder.start()
    got = read_line(p)
    p.send_signal(signal.SIGTERM)
    rest, err = b"", b""
    while chunk := p.stdout.read(65536):
        rest += chunk
    err = p.stderr.read()
    assert p.wait(GUARD) == -signal.SIGTERM, err
    assert err == b""
    feeder.join()
    p.stdin.close()
    got = (got + rest).splitlines(keepends=True)
    assert got[-1].endswith(b"\n") and 0 < len(got) < len(texts)
    n = min(len(got), 40)
    assert got[:n] == out(data=lines(texts[:n])).splitlines(keepends=True)
    assert got[-1] == out(data=lines([texts[len(got) - 1]]))


def feed(p, data):
    """Writes until the reader closes the pipe."""
    try:
        while data:
            data = data[p.stdin.write(data[:4096]) :]
    except BrokenPipeError:
        pass


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_waiting(sig, alone, tmp_path):
    with open(tmp_path / "v.npy", "w+b") as f:
        p = start("--output", "npy", stdout=f)
        p.stdin.write(b"two\nhalf")
        wait_for(lambda: os.fstat(f.fileno()).st_size > 128)
        p.send_signal(sig)
        assert p.wait(GUARD) == -sig and p.stderr.read() == b""
        p.stdin.close()
        f.seek(0)
        assert np.array_equal(npy(f.read())[0], np.array(json.loads(alone[2]), "<f4"))


def is_pending(pid, sig):
    """Whether the process has not taken the signal yet."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)$", status, re.M)
    return any(int(m, 16) >> (sig - 1) & 1 for m in masks)


def test_a_second_signal_kills():
    """If stdout is full and nobody reads, the first signal cannot end the run; the second does."""
    p = start()
    feeder = threading.Thread(target=feed, args=(p, b"two\n" * 300000))
    feeder.start()
    wait_for(lambda: waiting_in(p.stdout) >= 60000)
    p.send_signal(signal.SIGTERM)
    wait_for(lambda: not is_pending(p.pid, signal.SIGTERM))
    p.send_signal(signal.SIGINT)
    assert p.wait(GUARD) == -signal.SIGINT  # not SIGTERM's: the first one did not end it
    feeder.join()
    p.communicate()


def test_an_ignored_signal_stays_ignored():
    p = start(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    p.stdin.write(b"two\n")
    first = read_line(p)
    p.send_signal(signal.SIGINT)
    p.stdin.write(b"two\n")
    assert finish(p) == first


# ---- messages ----------------------------------------------------------------------------------


def test_stats():
    p = qemb(
        "--stats",
        "--truncate",
        "--max-tokens",
        4,
        "--batch-tokens",
        100,
        data=b"two\ntwo\n\n\xff\nmany more words than four\n",
    )
    assert p.returncode == 3 and p.stdout.count(b"\n") == 5
    lines_ = p.stderr.decode().splitlines()
    assert lines_[0] == "qemb: 1 of 5 records failed"
    tokens = 2 * len(objects("tokenize", data=b"two")[0]) + 1 + 4
    assert re.fullmatch(
        rf"qemb: 4 texts, {tokens} tokens in [0-9.]+ s " r"\([0-9.]+ texts/s, [0-9.]+ tokens/s\)",
        lines_[1],
    )
    assert (
        re.fullmatch(
            r"qemb: 1 batches, 3 distinct texts, 0 prefix tokens saved, 1 truncated, "
            r"1 errors, 5 rows, peak memory [0-9.]+ MiB, table [a-z0-9-]+",
            lines_[2],
        )
        and len(lines_) == 3
    )


def test_stats_of_a_run_that_an_error_stops():
    """The batch with the error has been computed."""
    p = qemb("--stats", "--on-error", "stop", "--dim", 2, data=b"a\nb\n\xff\nc\n")
    assert p.returncode == 3 and p.stdout.count(b"\n") == 2
    assert "qemb: 1 batches, 3 distinct texts, " in p.stderr.decode()


def test_weights_that_are_copied_show_progress():
    for table in tables():
        p = qemb("--cpu", table, "--progress", data=b"x\n")
        shown = re.findall(rb"\r\x1b\[Kweights: layer (\d+) of (\d+)", p.stderr)
        assert p.returncode == 0 and p.stderr.endswith(b"\r\x1b[K")
        copies = b"layers, copied" in out("plan", "--cpu", table)
        assert len(shown) == (3 if copies else 0), table
        assert all(int(a) == i + 2 for i, (a, _) in enumerate(shown))
        assert b"weights" not in qemb("--cpu", table, data=b"x\n").stderr


def test_progress(tmp_path):
    path = tmp_path / "texts"
    path.write_bytes(lines(TEXTS))
    with open(path, "rb") as f:
        p = qemb("--progress", stdin=f)
    assert re.search(rb"\r\x1b\[K\d+ texts, \d+ tokens/s, 100 %, ETA 0:00:00", p.stderr)
    assert p.stderr.endswith(b"\r\x1b[K")
    assert b"ETA" not in qemb("--progress", data=b"x\n").stderr
    master, slave = os.openpty()
    for args, shown in (((), True), (("--quiet",), False)):
        p = subprocess.run(
            [QEMB, "-m", MODEL, *args],
            input=b"x\n",
            stdout=subprocess.PIPE,
            stderr=slave,
            timeout=GUARD,
        )
        assert p.returncode == 0
        os.set_blocking(master, False)
        text = b""
        with contextlib.suppress(BlockingIOError):
            while True:  # a read may return a part of the data
                text += os.read(master, 1000)
        assert (b"1 texts" in text) == shown, text
    os.close(master)
    os.close(slave)


def test_help_has_a_line_for_each_option():
    text = out("--help", model=False).decode()
    assert max(map(len, text.splitlines())) <= 80
    options = re.findall(r"^  (?:-., )?(--[a-z-]+)(?=[ \n])", text, re.M)
    options.remove("--query")  # without a value, and with one for rerank
    assert len(options) == len(set(options)) > 20 and "--query" in options
    manual = re.sub(r"\\f.|\\(?=-)", "", (ROOT / "docs/man/qemb.1").read_text())
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", manual))
    assert named - {"--device"} == set(options) | {"--help", "--version"}  # cut short
    assert text == out("-h", model=False).decode() == out("check", "--help", model=False).decode()
    assert re.fullmatch(rb"qemb \d+\.\d+\.\d+\n", out("--version", model=False))
    assert out("-V", model=False) == out("--version", model=False)


USAGE = [
    ([MODEL], r"means nothing \(texts come from standard input, a model by -m\)"),
    (["--cpu", "abacus"], "--cpu: not on this machine"),
    (["--cpu", ""], "--cpu: not on this machine"),
    (["--cpu", "plai"], r"--cpu: not on this machine .got plai, want plain"),
    (["info", "--cpu", "abacus"], "--cpu: not on this machine"),
    (["--math", "fp1"], r"--math: not with this program on this machine .got fp1, want f32"),
    (["--math", "f16"], r"--math: not with this program on this machine .got f16, want f32"),
    (
        ["--cpu", "plain", "--math", "fp8"],
        r"--math: not with --cpu plain .got fp8, want f32, bf16, int16, int8\)",
    ),
    ((), r"no model \(want -m"),
    (("-m",), "-m: needs a value"),
    (("-m", MODEL, "--dim"), "--dim: needs a value"),
    (("-m", MODEL, "--dimm", "3"), "--dimm: unknown or ambiguous option"),
    (("-m", MODEL, "--t"), "--t: unknown or ambiguous option"),
    (("-m", MODEL, "-x"), "-x: unknown option"),
    (("-m", MODEL, "--query=yes"), "--query: takes no value"),
    (("-m", MODEL, "--dim", "0"), r"--dim: .*got 0, want 1\.\."),
    (("-m", MODEL, "--dim", "129"), r"--dim: .*got 129, want 1\.\.128"),
    (("-m", MODEL, "--dim", "12x"), "--dim: .*got 12x"),
    (("-m", MODEL, "--dim", " 12"), "--dim"),
    (("-m", MODEL, "--dim", "+12"), "--dim"),
    (("-m", MODEL, "--dim", ""), "--dim"),
    (("-m", MODEL, "--dim", "99999999999999999999999"), "--dim"),
    (("-m", MODEL, "--threads", "0"), "--threads"),
    (("-m", MODEL, "--batch-tokens", "-5"), "--batch-tokens"),
    (("-m", MODEL, "--max-tokens", "2049"), r"--max-tokens: .*got 2049, want 1\.\.2048"),
    (("plan", "-m", MODEL, "--max-tokens", "2049"), r"--max-tokens: .*got 2049, want 1\.\.2048"),
    (("-m", MODEL, "--output", "csv"), "--output: unknown .got csv, want json, jsonl"),
    (("-m", MODEL, "--input", "json"), "--input: unknown .got json, want text, jsonl"),
    (("-m", MODEL, "--on-error", "die"), "--on-error: .*want record, zero, skip, stop"),
    (("-m", MODEL, "--on-error", "record", "--output", "f32"), "--on-error record"),
    (("-m", MODEL, "--keep", "--input", "jsonl"), "--keep: .*--output jsonl"),
    (("-m", MODEL, "--keep", "--output", "jsonl"), "--keep: .*want --input jsonl"),
    (("-m", MODEL, "--errors-ok", "--on-error", "stop"), "--errors-ok: .*want --on-error record, "),
    (("-m", MODEL, "--errors-ok", "--output", "f32"), "--errors-ok: .*want --on-error zero"),
    (("-m", MODEL, "--query", "--instruct", "x"), "--prompt and --instruct: only one of them"),
    (("-m", MODEL, "--instruct", ""), "--instruct: an empty task"),
    (("-m", MODEL, "--instruct", b"\xff"), "--instruct: .*invalid UTF-8"),
    (("-m", MODEL, "texts.txt"), "texts.txt: .*standard input"),
    (("-m", MODEL, "tokenize", "texts.txt"), "texts.txt"),
    (("info", MODEL, MODEL), "operand"),
    (("tokenize", "-m", MODEL, "--dim", "3"), "--dim: means nothing to qemb tokenize"),
    (("info", "-m", MODEL, "--query"), "--query: means nothing to qemb info"),
    (("-m", MODEL, "plan", "--verify"), "--verify: means nothing to qemb plan"),
]


def table_of(*args):
    """The table that a run with these options uses. `info` names the same one."""
    p = qemb(*args, "--stats", data=b"x\n")
    assert p.returncode == 0, p.stderr
    table = re.search(r", table (.*)\n", p.stderr.decode())[1]
    told = out("info", *args).decode()
    assert re.search(r"^table +(.*), on this machine$", told, re.M)[1] == table
    return table


MATHS = ["f32", "int16", "bf16", "int8"]  # the least error first: docs/accuracy.md


def math_of(table):
    return table.split("-")[1] if "-" in table else "f32"


def test_cpu_names_a_table(alone):
    data = lines(TEXTS)
    assert tables()[0] == "plain" == table_of("--cpu", "plain")
    assert out("--cpu", table_of(), data=data) == b"".join(alone)  # what is used by default
    seen = {}  # AVX-VNNI has the bits of AVX2; all others round differently
    for name in tables():
        assert table_of("--cpu", name) == name
        got = out("--cpu", name, data=data)
        assert seen.setdefault(name.replace("avxvnni", "avx2"), got) == got
        for a, b in zip(got.splitlines(), alone):
            a, b = np.array(json.loads(a)), np.array(json.loads(b))
            if math_of(name) == "f32":
                # float32 computations of a unit vector: tests/golden has their own error, 1.4e-7
                assert np.all(np.abs(a - b) < 2e-5)
            else:  # a sanity check: tests/unit/accuracy.c has what an arithmetic costs
                assert np.dot(a, b) > 0.99
    assert len(set(seen.values())) == len(seen)


def test_math_is_the_largest_error(alone):
    """Every arithmetic is served, where the CPU lacks its instructions too."""
    assert out("--math", "f32", data=lines(TEXTS)) == b"".join(alone)
    for i, math in enumerate(MATHS):
        assert math_of(table_of("--math", math)) in MATHS[: i + 1]
        assert table_of("--math", math, "--cpu", "plain") == "plain"
        for name in tables():
            if i >= MATHS.index(math_of(name)):
                served = table_of("--math", math, "--cpu", name)
                assert served == name or name in ("avx2", "avx512", "amx")
                assert served.split("-")[0] == name.split("-")[0]
                continue
            p = qemb("--math", math, "--cpu", name, data=b"x\n")
            said = f"--math: a smaller error than that of --cpu {name} (got {math}, want "
            assert p.returncode == 1 and said in p.stderr.decode()
            want = re.search(r"want (.*)\)", p.stderr.decode())[1].split(", ")
            assert set(want) == set(MATHS[MATHS.index(math_of(name)) :])


@pytest.mark.parametrize("args, message", USAGE, ids=[m for _, m in USAGE])
def test_usage_errors(args, message):
    p = qemb(*args, model=False, data=b"x\n")
    assert p.returncode == 1 and p.stdout == b""
    said = p.stderr.decode().splitlines()
    assert re.search(message, said[0]) and said[0].startswith("qemb: "), said
    assert said[1:] == ["qemb: hint: qemb --help"]


def folder_with(*names):
    def make(path):
        path.mkdir()
        for name in names:
            (path / name).write_text("{}")

    return make


def in_folder(path, data):
    folder_with("config.json")(path.parent)
    path.write_bytes(data)


def safetensors(path):
    in_folder(path, struct.pack("<Q", 2) + b"{}" + bytes(16))


def other_version(path):
    data = Path(MODEL).read_bytes()
    path.write_bytes(data[:8] + struct.pack("<I", 2) + data[12:])


WANT = "(want a .qemb file: make convert MODEL="
NOT_A_MODEL = {  # what -m names -> (how it is made, what is said of it)
    "hf dir": (folder_with("config.json", "model.safetensors"),
               f'{{0}}: a Hugging Face directory {WANT}"{{0}}" OUT=model.qemb)'),
    "lora": (folder_with("adapter_config.json", "config.json"),
             "{0}: a LoRA adapter (want a model: merge the two by peft's merge_and_unload, then "
             "make convert MODEL=MERGED OUT=model.qemb)"),
    "empty": (folder_with(), "{0}: a directory (want a .qemb file)"),
    "m.gguf": (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + bytes(16)),
               f"{{0}}: a GGUF file {WANT}{{0}} OUT=model.qemb)"),
    "hf/model.safetensors": (
        safetensors, f"{{0}}: a safetensors file of a Hugging Face directory {WANT}{{1}} "
        "OUT=model.qemb)"),
    "hf/pytorch_model.bin": (
        lambda path: in_folder(path, b"PK\3\4" + bytes(30)),
        f"{{0}}: a zip, as PyTorch's checkpoint in a Hugging Face directory {WANT}{{1}} "
        "OUT=model.qemb)"),
    "hf/sentencepiece.bpe.model": (
        lambda path: in_folder(path, b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"),
        f"{{0}}: a SentencePiece model of a Hugging Face directory {WANT}{{1}} OUT=model.qemb)"),
    "v2.qemb": (other_version, "{0}: a .qemb file of version 2 ({2} reads version 1: make "
                "convert makes the file again)"),
    "Qwen/Qwen3-Embedding-0.6B": (
        None, f"{{0}}: no such file; a name on the hub is not opened {WANT}{{0}} OUT=model.qemb)"),
    "no.qemb": (None, "{0}: No such file or directory (make convert "
                "MODEL=Qwen/Qwen3-Embedding-0.6B OUT=model.qemb makes a model)"),
    "my/no.qemb": (None, "{0}: No such file or directory (make convert "
                   "MODEL=Qwen/Qwen3-Embedding-0.6B OUT=model.qemb makes a model)"),
    "text": (lambda path: path.write_bytes(b"text\n" * 1000), "{0}: magic: not a .qemb file"),
}


@pytest.mark.parametrize("name", NOT_A_MODEL)
def test_what_is_no_model_is_named_with_the_next_step(name, tmp_path):
    make, said = NOT_A_MODEL[name]
    if make:
        make(tmp_path / name)
    version = out("--version", model=False).decode().strip()
    want = f"qemb: {said.format(name, Path(name).parent, version)}\n"
    for command in "embed", "info", "plan", "grep", "rerank":
        args = {"embed": [], "grep": ["grep", "x"]}.get(command, [command])
        p = qemb(*args, "-m", name, model=False, data=b"x\n", cwd=tmp_path)
        assert (p.returncode, p.stdout, p.stderr.decode()) == (2, b"", want)


def test_options_anywhere_and_last_one_wins(alone):
    command = [QEMB, "--dim=9", "-m" + MODEL, "--dim", "128", "--"]
    p = subprocess.run(command, input=b"two\n", stdout=subprocess.PIPE, timeout=GUARD)
    assert p.stdout == alone[2]
    assert out("-m", MODEL, "tokenize", model=False, data=b"") == b""


def test_the_environment_changes_nothing(alone):
    env = {**os.environ, "POSIXLY_CORRECT": "1", "QEMB_THREADS": "x", "LC_ALL": "de_DE.UTF-8"}
    assert out("tokenize", "--query", env=env, data=b"x") == out("tokenize", "--query", data=b"x")
    assert out(env=env, data=b"two\n") == alone[2]


def test_model_errors(tmp_path):
    (tmp_path / "not.qemb").write_bytes(b"hello")
    for path, message in (
        (tmp_path / "not.qemb", "not.qemb: "),
        (tmp_path / "none", "none: "),
        (tmp_path, ": "),
    ):
        for command in ((), ("info",), ("tokenize",), ("plan",), ("check",)):
            p = qemb(*command, "-m", path, model=False, data=b"x\n")
            assert p.returncode == 2 and p.stdout == b""
            assert p.stderr.count(b"\n") == 1 and message in p.stderr.decode()


# ---- other commands ----------------------------------------------------------------------------


def test_tokenize_errors_keep_their_place():
    data = jsonl({"text": "a"}, {"id": "k", "txt": "a"}, {"ids": [1]}, {"text": "z " * 3000})
    got = objects("tokenize", "--input", "jsonl", status=3, data=data)
    assert got[0][-1] == EOS and got[2] == [1, EOS]
    assert got[1]["id"] == "k" and got[1]["line"] == 2 and got[1]["error"]["code"] == "bad_record"
    assert got[3]["error"]["code"] == "too_long"


def test_info(tmp_path):
    text = out("info").decode()
    assert text == out("info", MODEL, model=False).decode()
    for line in (
        "dtype            f16",
        f"hidden           {HIDDEN}",
        f"longest text     {MAX_TOKENS} tokens",
    ):
        assert line + "\n" in text
    assert json.loads(re.search(r'"query": (".*")', text)[1]) == f"Instruct: {TASK}\nQuery:"
    recorded = re.search(r"sha256           ([0-9a-f]{64})\n", text)[1]
    assert recorded == Path(MODEL).read_bytes()[40:72].hex()
    assert "random weights" in text  # provenance
    assert out("info", "--verify").decode() == text + "verified         yes\n"
    assert "tables           proved by their checksum\n" in text
    path = with_another_weight(tmp_path)
    got = out("info", "--verify", path, model=False, status=2, errors="SHA-256").decode()
    assert "verified         no" in got
    old = bytearray(Path(MODEL).read_bytes())
    old[24:32] = old[140:148] = bytes(8)
    end = 4096 + 96 * struct.unpack_from("<I", old, 32)[0]
    struct.pack_into("<Q", old, 24, checksum(old[:end]))
    path.write_bytes(old)
    got = out("info", "--verify", path, model=False).decode()
    assert "tables           no checksum (an older file)\n" in got


def with_another_weight(folder):
    """The model with a flipped bit in a matrix, which has no checksum of its own."""
    model = bytearray(Path(MODEL).read_bytes())
    model[int.from_bytes(model[4096 + 96 * 4 + 72 :][:8], "little")] ^= 1  # tok_emb
    path = folder / "bad.qemb"
    path.write_bytes(model)
    return path


def test_verify_before_the_first_text(tmp_path):
    path = with_another_weight(tmp_path)
    said = f"qemb: {path}: SHA-256: not what its writer recorded; copy or convert it again\n"
    for command in ((), ("tokenize",), ("check",)):
        p = qemb(*command, "-m", path, "--verify", model=False, data=b"a\n")
        assert (p.returncode, p.stdout, p.stderr) == (2, b"", said.encode())
    assert qemb("--verify", data=b"a\n").returncode == 0


def convert(folder, file, *options):
    script = ROOT / "convert_weights.py"
    command = [sys.executable, script, folder, "--quiet", "--out", file, *options]
    subprocess.run(command, check=True)


def test_info_says_what_is_exact_in_bfloat16(tmp_path):
    def shown(path):
        return re.findall(r"^exact in bf16    (.*)$", out("info", path, model=False).decode(), re.M)

    assert shown(MODEL) == ["not recorded (an older file)"]
    s = dict(layers=2, hidden=8, heads=2, kv=1, hd=4, ffn=8, vocab=300, max=64)
    hf.save_random_model(tmp_path / "model", s, json.dumps(hf.tokenizer_json([("a", "b")])))
    file = tmp_path / "model.qemb"
    for wide, exact in (("no tensor", "all 8"), ("layers.1.mlp.up", "7 of 8"), ("", "0 of 8")):
        tensors = hf.random_tensors(s, 1, "BF16")
        more = hf.random_tensors(s, 1, "F32")
        tensors |= {name: t for name, t in more.items() if wide in name}
        hf.save_safetensors(tmp_path / "model/model.safetensors", tensors)
        convert(tmp_path / "model", file)
        assert shown(file) == [f"{exact} matrices of the layers"]
    convert(tmp_path / "model", file, "--dtype", "int8")
    assert shown(file) == []


def test_plan():
    def batch(text):
        return {
            int(m[2]): float(m[1])
            for m in re.finditer(
                r"([0-9.]+) MiB  activations: a batch of --batch-tokens (\d+)", text
            )
        }

    usual = batch(out("plan").decode())
    assert sorted(usual) == [512, 1024, 2048, 4096, 8192, 16384, 32768]
    assert sorted(usual.values()) == [usual[n] for n in sorted(usual)]
    assert batch(out("plan", "--batch-tokens", 1024).decode()) == {1024: usual[1024]}
    longest = lambda n: float(
        re.search(
            rf"([0-9.]+) MiB  activations: one text of --max-tokens {n}\n",
            out("plan", "--max-tokens", n).decode(),
        )[1]
    )
    assert longest(64) < longest(2048)
    assert "copied" not in out("plan", "--cpu", "plain").decode()
    # halves, or a byte for each of 688,128 weights and a half for each 64, in whole panels of 32
    # rows
    sizes = {"avx512": (1.2, 1.5), "avx512-int16": (1.2, 1.5), "avx512-int8": (0.6, 0.9)}
    for table in set(sizes) & set(tables()):
        copied = re.search(r"([0-9.]+) MiB  layers, copied", out("plan", "--cpu", table).decode())
        assert sizes[table][0] < float(copied[1]) < sizes[table][1]


def test_int8_file_beside_its_f16_file(tmp_path):
    """What a table for int8 makes of F16 weights when it loads them is what an int8 file has: the
    same bits. Rows of 72 and 130 weights, so that groups end early; F32 weights, which both round
    to halves. """
    s = dict(layers=2, hidden=72, heads=4, kv=2, hd=18, ffn=130, vocab=300, max=64)
    hf.save_random_model(tmp_path / "model", s, json.dumps(hf.tokenizer_json([("a", "b")])))
    hf.save_safetensors(tmp_path / "model/model.safetensors", hf.random_tensors(s, 1, "F32"))
    files = [tmp_path / "f16.qemb", tmp_path / "int8.qemb"]
    for file in files:
        convert(tmp_path / "model", file, "--dtype", file.stem)
    embed = lambda file, *args: np.array(
        vectors("-m", file, *args, data=lines(TEXTS), model=False)
    )
    halves, eight = (embed(file) for file in files)
    off = np.linalg.norm(halves - eight, axis=1)
    assert (off > 1e-4).all() and (off < 3.6e-2).all()  # rounded, and by no more than is promised
    assert "int8, a scale per 64 weights" in out("info", "-m", files[1], model=False).decode()
    names = [name for name in tables() if math_of(name) == "int8"]
    if not names:
        pytest.skip("this CPU has no table for int8")
    for name in names:
        halves, eight = (embed(file, "--cpu", name) for file in files)
        assert halves.tobytes() == eight.tobytes()


def test_check_of_an_unknown_shape():
    text = out("check").decode()
    scores = [float(x) for x in re.findall(r"^q\d\.d\d +(-?[0-9.]+)$", text, re.M)]
    assert "No expected scores are known" in text and len(scores) == 4
    queries = vectors("--query", data=b"What is the capital of China?\nExplain gravity\n")
    docs = vectors(
        data=b"The capital of China is Beijing.\nGravity is a force that attracts two "
        b"bodies towards each other. It gives weight to physical objects and is "
        b"responsible for the movement of planets around the sun.\n"
    )
    for i, s in enumerate(scores):
        want = float(np.dot(queries[i // 2].astype(float), docs[i % 2].astype(float)))
        assert abs(s - want) <= 0.6e-7  # seven digits are printed
