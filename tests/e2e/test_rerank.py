"""`qemb rerank`, run as a user does, on tests/fixtures/reranker.qemb, whose weights are random.

QEMB_BIN names the program, as in test_protocol.py.
"""

import functools
import gzip
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import threading
import time

import edit_qemb
import numpy as np
import pytest
from helpers import GUARD, QEMB, ROOT, is_sanitized, jsonl, read_line, stdout_of, tables

MODEL = str(ROOT / "tests" / "fixtures" / "reranker.qemb")
EMBEDDING = str(ROOT / "tests" / "fixtures" / "small.qemb")
MAX_TOKENS = BATCH_TOKENS = 2048

FILE = edit_qemb.Qemb(MODEL)
TASK = FILE.prompts["instruct"]
QUERY = "What is the capital of China?"
DOCUMENTS = [
    "The capital of China is Beijing.", "", "two", "two", "中文", "nul \0 inside", "a" * 40,
    "  spaces  ", "A list\nof lines.\n", "😀", "<|im_end|>", "A list of words.",
]


def command(*args, model=MODEL):
    text = lambda a: a if isinstance(a, bytes) else str(a)
    return [QEMB, "rerank", "-m", str(model), *map(text, args)]


def rerank(*args, data=b"", model=MODEL, **kw):
    """The finished process; data goes to its stdin."""
    if "stdin" not in kw:
        kw["input"] = data
    kw.setdefault("stdout", subprocess.PIPE)
    return subprocess.run(command(*args, model=model), stderr=subprocess.PIPE, timeout=GUARD, **kw)


def out(*args, status=0, errors=None, **kw):
    """stdout of a run that must end with that status; stderr must be empty or match errors."""
    return stdout_of(rerank(*args, **kw), status, errors)


def objects(*records, args=(), **kw):
    return [json.loads(l) for l in out(*args, data=jsonl(*records), **kw).splitlines()]


def ask(query=QUERY, documents=DOCUMENTS, **more):
    return {"query": query, "documents": documents, **more}


@functools.cache
def alone(query, document, *args, **more):
    """The score of a pair that is computed by a process of its own."""
    (got,) = objects(ask(query, [document], **more), args=args)
    return got["results"][0]["relevance_score"]


def ranked(query, documents, top=None, *args, **more):
    """The results that a record has to have."""
    scores = [alone(query, d, *args, **more) for d in documents]
    order = sorted(range(len(documents)), key=lambda i: (-scores[i], i))
    return [{"index": i, "relevance_score": scores[i]} for i in order[:top]]


# ---- the ids, by the tokenizer of an embedding model ---------------------------------------------


@pytest.fixture(scope="session")
def as_embedding(tmp_path_factory):
    """The reranker's weights as an embedding model without end-of-text."""
    f = edit_qemb.Qemb(MODEL)
    f.config["kind"] = 0
    f.config["max_positions"], f.config["window"] = 1 << 16, 0  # to tokenize what is too long
    f.set_dense(None, None)
    return f.write(tmp_path_factory.mktemp("model") / "embedding.qemb")


def token_ids(model, texts):
    p = subprocess.run([QEMB, "tokenize", "-0", "-m", model, "--input", "jsonl"],
                       input=b"".join(json.dumps({"text": t}).encode() + b"\0" for t in texts),
                       stdout=subprocess.PIPE, timeout=GUARD)
    assert p.returncode == 0
    return [json.loads(l) for l in p.stdout.splitlines()]


@pytest.fixture(scope="session")
def pair_ids(as_embedding):
    """(query, document), ... -> lists of the ids that the model computes."""

    def of(*pairs, task=TASK):
        middles = [f"<Instruct>: {task}\n<Query>: {q}\n<Document>: {d}" for q, d in pairs]
        prefix, suffix, *ids = token_ids(
            as_embedding, [FILE.prompts["prefix"], FILE.prompts["suffix"], *middles])
        return [prefix + i + suffix for i in ids]

    return of


# ---- transformers' scores ------------------------------------------------------------------------

GOLDEN = ROOT / "tests" / "golden"


@functools.cache
def golden_pairs():
    lines = (GOLDEN / "reranker.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_truncated_documents_are_told():
    """The bytes that are cut: the document without them gives the same tokens and score."""
    document = "A list of words. " * 60
    got, short = golden_scores([ask("q", [document, "short"]), ask("q", ["short"])])
    long, not_cut = got["results"]
    assert "truncated_bytes" not in not_cut and "truncated_bytes" not in short["results"][0]
    (again,) = golden_scores([ask("q", [document[: -long.pop("truncated_bytes")], "short"])])
    assert again == got | {"id": 1, "results": [long, not_cut]}
    stats = rerank("--truncate", "--stats", data=jsonl(ask("q", [document, "short"])),
                   model=GOLDEN / "reranker.qemb").stderr
    assert b" 1 truncated" in stats


def golden_scores(records, *args):
    got = objects(*records, args=("--truncate", *args), model=GOLDEN / "reranker.qemb")
    for g in got:
        g["results"].sort(key=lambda r: r["index"])
    return got


@pytest.mark.parametrize("args", [(), ("--batch-tokens", "1"), ("--cpu", "plain")])
def test_scores_equal_transformers(args):
    """1,000 pairs of query and document, each a record: transformers' scores, computed in double by
    the steps of the model card, to 1e-6. Among them are empty documents, pairs over the window of
    256 tokens, tasks, and special tokens in texts. --batch-tokens 1 computes each pair alone.

    Float errs by 1.2e-7 in a number of a unit vector (f32_diff of such goldens). Times the row's
    length, 5.7, times the length of dense, 4.2, times a score's slope of at most 1/4, that is
    7e-7."""
    pairs = golden_pairs()
    assert len(pairs) == 1000 and any(not p["document"] for p in pairs)
    records = [{k: p[k] for k in ("query", "instruct") if k in p} | {"documents": [p["document"]]}
               for p in pairs]
    whole = objects(*records, status=3, errors="records failed", model=GOLDEN / "reranker.qemb")
    assert 50 < sum("error" in g for g in whole) < 100  # too long without --truncate
    for p, g in zip(pairs, golden_scores(records, *args), strict=True):
        assert g["tokens"] == p["tokens"]
        assert abs(g["results"][0]["relevance_score"] - p["score"]) <= 1e-6


def test_scores_of_one_query_equal_transformers():
    """The same pairs as documents of their queries: many share a query with others."""
    by_query = {}
    for p in golden_pairs():
        by_query.setdefault((p["query"], p.get("instruct")), []).append(p)
    records = [ask(query, [p["document"] for p in pairs],
                   **({} if task is None else {"instruct": task}))
               for (query, task), pairs in by_query.items()]
    records.sort(key=lambda r: len(r["documents"]))
    assert len(records[-1]["documents"]) > 5
    for r, g in zip(records, golden_scores(records), strict=True):
        want = by_query[r["query"], r.get("instruct")]
        for p, x in zip(want, g["results"], strict=True):
            assert abs(x["relevance_score"] - p["score"]) <= 1e-6


# ---- records -------------------------------------------------------------------------------------


def test_one_answer_per_record_in_order(pair_ids):
    rng = random.Random(1)
    some = lambda: rng.sample(DOCUMENTS, rng.randrange(1, 9))
    records = [ask(rng.choice([QUERY, "gravity", ""]), some(), id=i) for i in range(30)]
    got = objects(*records)
    assert [g["id"] for g in got] == list(range(30))
    for r, g in zip(records, got):
        assert list(g) == ["id", "results", "tokens"]
        assert g["results"] == ranked(r["query"], r["documents"])
        ids = pair_ids(*((r["query"], d) for d in r["documents"]))
        assert g["tokens"] == sum(map(len, ids))
    assert len({x["relevance_score"] for g in got for x in g["results"]}) > len(DOCUMENTS)


def test_scores_are_those_of_the_rows(as_embedding, pair_ids, tmp_path):
    """logit = dense . row, and a row is the last norm's: its numbers divided by the norm's weights
    have the mean square 1. The vector has the row's direction, so it gives the row. With norm_eps
    1e-12 that is exact to rounding: a vector's 64 numbers are floats (2^-24 each), and the same row
    is the reranker's input. The logit's error is below |dense| |row| 2^-23, a score's a quarter of
    it, and the score's own rounding to float is below 2^-24. A row's length is at most
    8 max |w|."""
    f = edit_qemb.Qemb(MODEL)
    f.config["norm_eps"] = 1e-12
    model = f.write(tmp_path / "reranker.qemb")
    f.config["kind"] = 0
    f.set_dense(None, None)
    plain = f.write(tmp_path / "plain.qemb")
    w, dense = (np.array(FILE.floats(name)) for name in ("final_norm", "dense"))
    ids = pair_ids(*((QUERY, d) for d in DOCUMENTS))
    p = subprocess.run([QEMB, "-m", plain, "--input", "jsonl"], stdout=subprocess.PIPE,
                       input=jsonl(*({"ids": i} for i in ids)), timeout=GUARD, check=True)
    (got,) = objects(ask(), model=model)
    scores = {r["index"]: r["relevance_score"] for r in got["results"]}
    bound = np.linalg.norm(dense) * 8 * abs(w).max() * abs(w).max() / abs(w).min() * 2.0**-23
    assert bound < 1e-4
    for i, line in enumerate(p.stdout.splitlines()):
        normed = np.array(json.loads(line)) / w
        row = normed / np.sqrt(np.mean(normed**2)) * w
        want = 1 / (1 + math.exp(-(dense @ row)))
        assert abs(scores[i] - want) <= bound / 4 + 2.0**-24


def test_ids_of_every_json_type():
    ids = ["text", "", "q\"uote\n é", 7, -1, 2**53, 1.5, True, False, None, [1, {"a": None}],
           {"k": []}]
    got = objects(*(ask("q", ["d"], id=i) for i in ids), ask("q", ["d"]))
    assert [json.dumps(g["id"]) for g in got] == [*map(json.dumps, ids), str(len(ids) + 1)]


def test_top_n():
    want = ranked(QUERY, DOCUMENTS)
    for top in (1, 3, len(DOCUMENTS), 1000, 2**63 - 1):
        assert objects(ask(top_n=top))[0]["results"] == want[:top]
    assert objects(ask(top_n=0))[0]["results"] == want
    assert objects(ask(), ask(top_n=5), ask(top_n=None), args=("-k", 2)) == [
        {"id": i, "results": want[:n], "tokens": objects(ask())[0]["tokens"]}
        for i, n in ((1, 2), (2, 5), (3, 2))]
    assert objects(ask(), args=("--best", 1))[0]["results"] == want[:1]


def test_equal_scores_are_in_order_of_index():
    got = objects(ask(documents=["two", "x", "two", "x", "two"]))[0]["results"]
    for a, b in zip(got, got[1:]):
        assert (-a["relevance_score"], a["index"]) < (-b["relevance_score"], b["index"])
    assert len({r["relevance_score"] for r in got}) == 2


def test_instruct(pair_ids):
    plain = alone(QUERY, "two")
    assert alone(QUERY, "two", instruct=TASK) == plain == alone(QUERY, "two", instruct=None)
    other, empty = alone(QUERY, "two", instruct="Find it"), alone(QUERY, "two", instruct="")
    assert len({plain, other, empty}) == 3
    assert alone(QUERY, "two", "--instruct", "Find it") == other
    assert alone(QUERY, "two", "--instruct", "Find it", instruct=TASK) == plain
    got = objects(ask(documents=["two"], instruct="Find it"), ask(documents=["two"], instruct=""))
    for g, task in zip(got, ("Find it", "")):
        assert g["tokens"] == len(pair_ids((QUERY, "two"), task=task)[0])


def test_documents_as_objects():
    mixed = [{"text": d} if i % 2 else d for i, d in enumerate(DOCUMENTS)]
    assert objects(ask(documents=mixed)) == objects(ask())


def test_nothing_in_a_record():
    assert objects(ask(documents=[])) == [{"id": 1, "results": [], "tokens": 0}]
    got = objects(ask(documents=[], id="a"), ask("", [""]), ask(documents=[], id="b"))
    assert [g["id"] for g in got] == ["a", 2, "b"] and len(got[1]["results"]) == 1
    assert out(data=b"") == b""


def test_compressed_records():
    data = jsonl(ask(id="a"), ask(id="b", documents=["two"]))
    assert out(data=gzip.compress(data)) == out(data=data)
    cut = gzip.compress(data)[:-1]
    got = out(data=cut, status=1, errors="^qemb: standard input: cannot read .compressed data: cut")
    assert got == out(data=data)


def test_ends_of_records():
    one = out(data=jsonl(ask(id=1)))
    assert out(data=jsonl(ask(id=1))[:-1]) == one == out(data=jsonl(ask(id=1))[:-1] + b"\r\n")
    assert out("-0", data=jsonl(ask(id=1)).replace(b"\n", b"\0")) == one
    assert out("--null", data=json.dumps(ask(id=1), indent=1).encode()) == one  # over many lines


BAD = [
    (b"", "invalid_json", None, "empty line"),
    (b"oops", "invalid_json", None, ""),
    (b'{"query":"a","documents":["b\xff"]}', "invalid_utf8", None, ""),
    (b'{"id":7,"id":8,"query":"a","documents":[]}', "bad_record", None, "twice"),
    (b'{"query":"a","documents":[],"k\\u0000":1}', "invalid_json", None, ""),
    (b"[]", "bad_record", None, "want an object"),
    ({"id": 7, "documents": ["a"]}, "bad_record", 7, 'no "query"'),
    ({"id": 7, "query": "a"}, "bad_record", 7, 'no "documents"'),
    ({"id": 7, "query": 1, "documents": []}, "bad_record", 7, '"query": wrong type'),
    ({"id": 7, "query": "a", "documents": "b"}, "bad_record", 7, '"documents": wrong type'),
    ({"id": 7, "query": "a", "documents": ["b", 1]}, "bad_record", 7, '"documents"[1]'),
    ({"id": 7, "query": "a", "documents": ["b"], "top_n": -1}, "bad_record", 7, '"top_n"'),
    ({"id": 7, "query": "a", "documents": ["b"], "text": "c"}, "bad_record", 7, "unknown key"),
    ({"id": 7, "query": "a", "documents": ["b"], "é" * 99: 0}, "bad_record", 7, "unknown key"),
    ({"id": 7, "query": "a", "documents": ["b", "x " * 3000, "y " * 3000]}, "too_long", 7,
     "documents[1]: text: too long"),
    ({"id": 7, "query": "x " * 3000, "documents": ["b"]}, "query_too_long", 7,
     "query: too long for any document"),
]


def test_errors_keep_their_place():
    records = [r for bad, *_ in BAD for r in (ask("q", ["d", "two"]), bad)]
    p = rerank(data=jsonl(*records, ask("q", ["d"])))
    assert p.returncode == 3 and p.stderr == b"qemb: %d records failed\n" % len(BAD)
    got = [json.loads(l) for l in p.stdout.splitlines()]
    assert len(got) == len(records) + 1 and got[-1]["id"] == len(got)
    for i, (_, code, id, says) in enumerate(BAD):
        assert got[2 * i]["results"] == ranked("q", ["d", "two"])
        g = got[2 * i + 1]
        assert list(g) == ["id", "line", "error"] and g["line"] == 2 * i + 2
        assert g["id"] == id and g["error"]["code"] == code
        assert says in g["error"]["message"], g


def test_a_long_document(pair_ids):
    long = "x y " * 3000
    assert len(pair_ids((QUERY, long))[0]) > MAX_TOKENS
    got = objects(ask(documents=["two", long, long + "z"]), args=("--truncate",))[0]
    scores = {r["index"]: r["relevance_score"] for r in got["results"]}
    assert scores[0] == alone(QUERY, "two") and scores[1] == scores[2]
    assert got["tokens"] == len(pair_ids((QUERY, "two"))[0]) + 2 * MAX_TOKENS
    # the border
    n = len(pair_ids((QUERY, DOCUMENTS[0]))[0])
    one = ask(documents=DOCUMENTS[:1])
    assert objects(one, args=("--max-tokens", n))[0]["results"] == ranked(QUERY, DOCUMENTS[:1])
    (e,) = objects(one, args=("--max-tokens", n - 1), status=3, errors="1 records failed")
    assert e["error"]["code"] == "too_long"
    assert f"want at most {n - 1} in all" in e["error"]["message"]
    (cut,) = objects(one, args=("--max-tokens", n - 1, "--truncate"))
    assert cut["tokens"] == n - 1 and cut["results"] != ranked(QUERY, DOCUMENTS[:1])
    # The last token of the document is the dot.
    (without,) = ranked(QUERY, [DOCUMENTS[0][:-1]])
    assert cut["results"] == [without | {"truncated_bytes": 1}]


def test_no_room_for_a_document(as_embedding):
    added = sum(map(len, token_ids(as_embedding, [FILE.prompts["prefix"], FILE.prompts["suffix"]])))
    for most in (1, added):
        said = f"no room beside the {added} tokens .*got {most}"
        out("--max-tokens", most, status=1, errors=said)
    out("--max-tokens", added + 1, "--truncate", data=jsonl(ask()))


def test_the_window_is_the_default_limit(tmp_path):
    f = edit_qemb.Qemb(MODEL)
    f.config["window"] = 300
    model = f.write(tmp_path / "window.qemb")
    record = ask(documents=["x y " * 200])
    (e,) = objects(record, model=model, status=3, errors="1 records failed")
    assert e["error"]["code"] == "too_long" and "at most 300 " in e["error"]["message"]
    (got,) = objects(record, model=model, args=("--max-tokens", MAX_TOKENS))
    assert got == objects(record)[0]
    assert objects(record, model=model, args=("--truncate",))[0]["tokens"] == 300
    p = subprocess.run([QEMB, "info", model], capture_output=True, timeout=GUARD)
    assert b"longest text     300 tokens, up to 2048 by --max-tokens\n" in p.stdout


def test_a_logit_that_is_not_finite(tmp_path):
    f = edit_qemb.Qemb(MODEL)
    f.set_dense([[3e38] * 64], [math.inf])
    model = f.write(tmp_path / "inf.qemb")
    got = objects(ask(documents=["a", "b"], id="x"), ask(documents=[]), model=model, status=3,
                  errors="1 records failed")
    assert got[0]["error"]["code"] == "non_finite" and got[0]["id"] == "x"
    assert got[0]["error"]["message"] == "documents[0]: score: not a finite number"
    assert got[1]["results"] == []
    p = rerank("--query", "q", data=b"a\n", model=model)
    assert p.returncode == 3 and p.stdout == b"" and b"line 1: non_finite: score" in p.stderr
    p = rerank("--query", "q", "--errors-ok", data=b"a\n", model=model)
    assert p.returncode == 0 and p.stdout == b"" and b"line 1: non_finite: score" in p.stderr
    assert objects(ask(documents=["a"]), args=("--errors-ok",), model=model, errors="1 records")
    p = subprocess.run([QEMB, "check", "-m", model], capture_output=True, timeout=GUARD)
    assert p.returncode == 2 and b"a score that is not finite" in p.stderr


def test_a_huge_record():
    """More documents than a batch has, more than a job of the pipeline has; one text of 10 MB."""
    n = 20_000 if is_sanitized(QEMB) else 60_000
    documents = [f"{i % 5000}" for i in range(n)]
    got = objects(ask(documents=documents), ask("q", ["d"]), ask(documents=["x " * 5_000_000]),
                  ask("q", ["d"]), status=3, errors="1 records failed")
    assert got[1]["results"] == got[3]["results"] == ranked("q", ["d"])
    assert got[2]["error"]["code"] == "too_long"
    results = got[0]["results"]
    keys = [(-r["relevance_score"], r["index"]) for r in results]
    assert keys == sorted(keys) and sorted(r["index"] for r in results) == list(range(n))
    scores = {}
    for r in results:  # equal documents in other batches have equal scores
        d = documents[r["index"]]
        assert scores.setdefault(d, r["relevance_score"]) == r["relevance_score"]
    for d in ("0", "77", "4999"):
        assert scores[d] == alone(QUERY, d)


# ---- the run -------------------------------------------------------------------------------------


def start(*args, **kw):
    return subprocess.Popen(command(*args), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, bufsize=0, **kw)


def test_answers_at_once():
    p = start()
    for record in (ask(), ask("q", []), ask("q", ["d"], top_n=1), "oops", ask(documents=["two"])):
        data = jsonl(record)
        p.stdin.write(data[: len(data) // 2])
        p.stdin.write(data[len(data) // 2 :])
        got = json.loads(read_line(p))
        if record == "oops":
            assert got["error"]["code"] == "invalid_json"
        else:
            assert got["results"] == ranked(record["query"], record["documents"])
    rest, err = p.communicate(timeout=GUARD)
    assert p.returncode == 3 and rest == b"" and err == b"qemb: 1 records failed\n"


@pytest.mark.parametrize("args", [(), ("--query", QUERY)], ids=["records", "lines"])
def test_a_closed_pipe(args):
    read, write = os.pipe()
    os.close(read)
    data = jsonl(*[ask()] * 50)
    p = rerank(*args, data=data, stdout=write)
    os.close(write)
    assert p.returncode == 4 and p.stderr == b""
    with open("/dev/full", "wb") as full:
        p = rerank(*args, data=data, stdout=full)
    assert p.returncode == 4 and b"standard output: cannot write (No space left" in p.stderr
    p = subprocess.run(["sh", "-c", f"{QEMB} rerank -m {MODEL} >&-"], stderr=subprocess.PIPE)
    assert p.returncode == 4 and p.stderr == b"qemb: standard output: closed\n"


def test_a_signal_between_records():
    p = start()
    p.stdin.write(jsonl(ask()))
    assert json.loads(read_line(p))["results"] == ranked(QUERY, DOCUMENTS)
    p.send_signal(signal.SIGINT)
    rest, err = p.communicate(timeout=GUARD)
    assert p.returncode == -signal.SIGINT and rest == err == b""


def test_a_signal_in_a_record():
    """Records that are complete are answered, the other is left out and told."""
    p = start("--threads", 1, "--batch-tokens", 64)
    many = [f"{i} and {i * i} are the numbers of this document" for i in range(100_000)]
    writer = threading.Thread(target=lambda: write_all(p, jsonl(ask(id="a"), ask(documents=many))))
    writer.start()
    first = json.loads(read_line(p))
    writer.join()  # all but what a pipe holds has been read; what follows takes seconds
    time.sleep(0.5)
    p.send_signal(signal.SIGINT)
    rest, err = p.stdout.read(), p.stderr.read()
    assert p.wait(GUARD) == -signal.SIGINT
    assert first["id"] == "a" and first["results"] == ranked(QUERY, DOCUMENTS)
    assert rest == b"" and b"left out" in err, err


def write_all(p, data):
    try:
        p.stdin.write(data)
        p.stdin.close()
    except BrokenPipeError:
        pass


@pytest.mark.parametrize("args", [(), ("--query", QUERY)], ids=["records", "lines"])
def test_standard_input_that_cannot_be_read(args):
    fd = os.open("/", os.O_RDONLY)
    p = rerank(*args, stdin=fd)
    os.close(fd)
    assert p.returncode == 1 and p.stdout == b""
    assert p.stderr == b"qemb: standard input: cannot read (Is a directory)\n"
    p = subprocess.run(["sh", "-c", f"{QEMB} rerank -m {MODEL} <&-"], stderr=subprocess.PIPE)
    assert p.returncode == 1 and p.stderr == b"qemb: standard input: closed\n"


# ---- the same bits -------------------------------------------------------------------------------

QUERIES = [QUERY, "gravity", "a list of words", "中文"]


def records_of_all():
    return [ask(q, DOCUMENTS[i:] + DOCUMENTS[:i], id=q) for i, q in enumerate(QUERIES)] * 3


def test_any_batch_and_threads():
    want = [ranked(r["query"], r["documents"]) for r in records_of_all()]
    for budget, threads in ((1, 2), (50, 1), (300, 3), (1000, 2), (8192, 1), (20000, 2)):
        got = objects(*records_of_all(), args=("--batch-tokens", budget, "--threads", threads))
        assert [g["results"] for g in got] == want, (budget, threads)


# L2 errors of a unit vector: docs/accuracy.md; of float, what test_protocol.py allows a number
ERRORS = {"f32": 2e-5 * 8, "bf16": 6e-3, "int16": 4e-4, "int8": 3.6e-2,
          "avx2-int8": 5.4e-2, "avxvnni-int8": 5.4e-2}


def test_tables_are_within_their_errors():
    """A row is a unit vector times at most 8 max |w|, and an error of the vector is one of the row
    before the norm's weights, which differ: max |w| / min |w|. A score's slope is at most 1/4."""
    w, dense = (np.array(FILE.floats(name)) for name in ("final_norm", "dense"))
    factor = np.linalg.norm(dense) * 8 * abs(w).max() * abs(w).max() / abs(w).min() / 4
    (plain,) = objects(ask(), args=("--cpu", "plain"))
    want = {r["index"]: r["relevance_score"] for r in plain["results"]}
    for table in tables():
        got = objects(ask(), args=("--cpu", table))[0]["results"]
        error = ERRORS.get(table, ERRORS[table.split("-")[1] if "-" in table else "f32"])
        for r in got:
            assert abs(r["relevance_score"] - want[r["index"]]) <= factor * error + 2.0**-23, table
        assert objects(*records_of_all(), args=("--cpu", table, "--batch-tokens", 300)) == objects(
            *records_of_all(), args=("--cpu", table)), table


# ---- what is computed ----------------------------------------------------------------------------


def common(a, b):
    """How many ids both texts begin with, but not their last ones."""
    return next((i for i, (x, y) in enumerate(zip(a[:-1], b[:-1])) if x != y),
                min(len(a), len(b)) - 1)


def packed(texts, budget):
    """Batches of distinct texts (lists of ids), as qemb_pack_add says, and the tokens that each
    computes: those of a common prefix, which leaves each text a token, once."""
    start = min(1024, budget) // 16  # what a further batch costs, beside its prefix
    batches, computed, lost, run, prefix = [], [], 0, 0, 0
    for t in texts:
        if batches and t in batches[-1]:
            continue
        joins = False
        if batches:
            batch = batches[-1]
            shorter = min(common(t, other) for other in batch)
            rows = sum(map(len, batch)) + len(t) - len(batch) * shorter
            more = common(t, batch[-1]) - shorter
            now = lost + (len(batch) - 1) * (prefix - shorter)
            again = run + more if more >= 16 else 0
            joins = rows <= budget and now + again <= shorter + start
        if joins:
            batch.append(t)
            prefix, lost, run, computed[-1] = shorter, now, again, rows
        else:
            batches.append([t])
            computed.append(len(t))
            prefix, lost, run = len(t) - 1, 0, 0
    return computed


def test_a_query_costs_little_more_than_its_different_tokens(pair_ids):
    """100 documents of 200 tokens, in batches of a real reranker's size: at most 1.02 times the
    nodes of a tree of all ids. Batches of 1,024 rows cost more than that."""
    rng = random.Random(3)
    words = sorted(set((ROOT / "tests/fixtures/small.txt").read_text(encoding="utf-8").split()))
    documents = [" ".join(rng.choices(words, k=200)) for _ in range(100)]
    while (n := [len(i) for i in pair_ids(*((QUERY, d) for d in documents))]) and max(n) > 300:
        documents = [d if k <= 300 else d[: len(d) * 300 // k] for d, k in zip(documents, n)]
    ids = pair_ids(*((QUERY, d) for d in documents))
    assert sum(map(len, ids)) > 25_000
    different = len({tuple(i[:k]) for i in ids for k in range(1, len(i) + 1)})

    def cost(*args):
        said = rerank("--stats", *args, data=jsonl(ask(documents=documents))).stderr.decode()
        return int(re.search(r"(\d+) tokens computed", said)[1]) / different

    assert 1 <= cost("--batch-tokens", 8192) <= 1.02 < cost("--batch-tokens", 1024)


@pytest.mark.parametrize("budget", [BATCH_TOKENS, 1000, 300, 64])
def test_stats(pair_ids, tmp_path, budget):
    records = [ask(q, [f"{d} {i}" for i in range(9) for d in DOCUMENTS[:8]]) for q in QUERIES]
    pairs = [(r["query"], d) for r in records for d in r["documents"]]
    ids = pair_ids(*pairs)
    want = packed(ids, budget)
    if budget == BATCH_TOKENS:
        assert len(want) == len(QUERIES)  # a batch a query
        assert sum(want) < sum(map(len, ids)) / 4
    file = tmp_path / "records"
    file.write_bytes(jsonl(*records))
    args = () if budget == BATCH_TOKENS else ("--batch-tokens", budget)
    with open(file, "rb") as f:
        p = rerank("--stats", *args, stdin=f)
    said = p.stderr.decode()
    assert p.returncode == 0
    assert re.match(rf"qemb: {len(pairs)} documents, {sum(map(len, ids))} tokens in [\d.]+ s "
                    r"\([\d.]+ documents/s\)\n", said), said
    batches, tokens = re.search(r"(\d+) batches, (\d+) tokens computed", said).groups()
    assert (int(batches), int(tokens)) == (len(want), sum(want))


def test_stats_of_nothing_computed():
    p = rerank("--stats", data=jsonl("oops", ask(documents=[])))
    assert b"qemb: 1 records failed\nqemb: 0 documents, 0 tokens in " in p.stderr
    assert b"qemb: 0 batches, 0 tokens computed" in p.stderr


# ---- lines ---------------------------------------------------------------------------------------


def ranked_lines(lines, top=None):
    scores = [alone(QUERY, l) for l in lines]
    order = sorted(range(len(lines)), key=lambda i: (-scores[i], i))[:top]
    return [(scores[i], lines[i]) for i in order]


def read_lines(data, end="\n"):
    rows = [r.split("\t", 1) for r in data.decode().split(end)]
    assert rows.pop() == [""]
    return [(float(score), text) for score, text in rows]


def test_lines():
    lines = ["two", "x", "", "two", "a\tb", "中文", "nul\0", "x"]
    data = "".join(l + "\n" for l in lines).encode()
    want = ranked_lines(lines)
    assert [f"{s:.9g}" for s, _ in want] == [f"{np.float32(s):.9g}" for s, _ in want]
    for d in (data, data[:-1], data.replace(b"\n", b"\r\n")):
        assert read_lines(out("--query", QUERY, data=d)) == want
    for k in (1, 3, 8, 99):
        assert read_lines(out("--query", QUERY, "-k", k, data=data)) == want[:k]
        assert read_lines(out(f"--query={QUERY}", f"--best={k}", data=data)) == want[:k]
    assert out("--query", QUERY) == b""
    assert len(read_lines(out("--query", "", data=data))) == len(lines)


def test_equal_lines_are_in_order():
    """They differ in NFC alone, and so have equal ids."""
    lines = [["caf\u00e9", "cafe\u0301", "two"][i * i % 7 % 3] for i in range(300)]
    data = "".join(l + "\n" for l in lines).encode()
    want = ranked_lines(lines)
    assert len({score for score, _ in want}) == 2
    for k in (1, 150, 299, 300):
        assert read_lines(out("--query", QUERY, "-k", k, data=data)) == want[:k]
    p = rerank("--query", QUERY, "--progress", data=data)
    assert p.returncode == 0 and b"\r" in p.stderr and read_lines(p.stdout) == want


def test_lines_that_end_with_nul():
    texts = ["one\ntwo\r", "", "x"]
    got = out("--query", QUERY, "-0", data="".join(t + "\0" for t in texts).encode())
    assert read_lines(got, "\0") == ranked_lines(texts)


def test_lines_have_the_task_of_instruct():
    got = read_lines(out("--query", QUERY, "--instruct", "Find it", data=b"two\n"))
    assert got == [(alone(QUERY, "two", instruct="Find it"), "two")]


def test_lines_with_errors():
    bad = b"".join(b"ab\xff%d\n" % i for i in range(12))
    p = rerank("--query", QUERY, data=b"two\n" + b"x " * 3000 + b"\n" + bad + b"x\n")
    assert p.returncode == 3 and read_lines(p.stdout) == ranked_lines(["two", "x"])
    said = p.stderr.decode().splitlines()
    assert len(said) == 11 and said[-1] == "qemb: 13 lines failed"
    assert said[0].startswith("qemb: line 2: too_long: text: too long")
    assert said[1].startswith("qemb: line 3: invalid_utf8: ") and "byte 2 " in said[1]
    cut = out("--query", QUERY, "--truncate", data=b"x " * 3000 + b"\n")
    assert len(read_lines(cut)) == 1


def test_a_bad_query():
    for args in (["--query", b"a\xff"], ["--query", "word " * 3000]):
        said = rerank(*args, data=b"two\n")
        assert said.returncode == 1 and said.stdout == b""
        assert said.stderr.startswith(b"qemb: --query: ") and said.stderr.count(b"\n") == 2
        assert (b"text: invalid UTF-8 at byte 1 " if args[1] == b"a\xff" else b"for any document"
                ) in said.stderr
    cut = out("--query", "word " * 3000, "--truncate", data=b"two\n",
              errors="^qemb: --query: query: too long .*: it is cut, and no document is read\n$")
    assert len(read_lines(cut)) == 1


def test_a_signal_ends_lines():
    """The best so far are printed."""
    p = start("--query", QUERY)
    p.stdin.write(b"two\nx\n")
    time.sleep(0.5)  # it waits for more; if it has not read the lines yet, none is printed
    p.send_signal(signal.SIGINT)
    rest, _ = p.communicate(timeout=GUARD)
    assert p.returncode == -signal.SIGINT
    assert read_lines(rest) in (ranked_lines(["two", "x"]), [])


# ---- options, and models of the other kind -------------------------------------------------------


def run(*args, data=b"x\n"):
    p = subprocess.run([QEMB, *map(str, args)], input=data, capture_output=True, timeout=GUARD)
    return p.returncode, p.stdout, p.stderr.decode()


def test_query_has_a_value_for_rerank_alone():
    flag = run("-m", EMBEDDING, "--query")
    assert flag == run("--query", "-m", EMBEDDING)
    assert flag[0] == 0 and flag[1] != run("-m", EMBEDDING)[1]
    want = (0, out("--query", "q", data=b"x\n"), "")
    assert run("rerank", "-m", MODEL, "--query", "q") == want
    assert run("-m", MODEL, "rerank", "--query=q") == want
    assert run("--query=q", "-m", MODEL, "rerank") == want
    assert run("rerank", "-m", MODEL, "--query")[2].startswith("qemb: --query: needs a value\n")
    assert "--query: takes no value" in run("-m", EMBEDDING, "--query=q")[2]
    assert run("grep", "-m", EMBEDDING, "--query", "q")[0] == 2
    for args in (["--query", "rerank"], ["--query", "rerank", "-m", EMBEDDING, "--dim", "2"]):
        status, printed, said = run("-m", EMBEDDING, *args)
        assert (status, printed) == (1, b"") and "--query: its value is the word rerank" in said
    assert "--query: means nothing to qemb info" in run("info", "-m", MODEL, "--query")[2]


USAGE = [
    (("--output", "json"), "--output: means nothing to qemb rerank"),
    (("--input", "jsonl"), "--input: means nothing to qemb rerank"),
    (("--dim", "3"), "--dim: means nothing to qemb rerank"),
    (("--prompt", "query"), "--prompt: means nothing to qemb rerank"),
    (("--document",), "--document: means nothing to qemb rerank"),
    (("--min-score", "0.5"), "--min-score: means nothing to qemb rerank"),
    (("-n",), "--line-number: means nothing to qemb rerank"),
    (("-k", "0"), r"--best: .*got 0, want 1\.\."),
    (("--instruct", ""), "--instruct: an empty task"),
    (("--instruct", b"\xff"), "--instruct: .*invalid UTF-8"),
    (("--max-tokens", "2049"), r"--max-tokens: .*got 2049, want 1\.\.2048"),
    (("documents.txt",), "documents.txt"),
]


@pytest.mark.parametrize("args, message", USAGE, ids=[m for _, m in USAGE])
def test_usage_errors(args, message):
    assert out(*args, status=1, errors=rf"^qemb: .*{message}.*\nqemb: hint: qemb --help\n$") == b""


def test_names_of_options_may_be_cut_short():
    assert run("rerank", "-m", MODEL, "--quer", "q")[1] == out("--query", "q", data=b"x\n")
    assert run("-m", EMBEDDING, "--quer")[1] == run("-m", EMBEDDING, "--query")[1]


def test_models_of_the_other_kind():
    status, printed, said = run("rerank", "-m", EMBEDDING)
    assert (status, printed) == (2, b"")
    assert said == f"qemb: {EMBEDDING}: an embedding model, which has no scores (want a reranker)\n"
    for args in ([], ["tokenize"], ["grep", "q"]):
        status, printed, said = run(*args, "-m", MODEL)
        assert (status, printed) == (2, b"")
        assert said == f"qemb: {MODEL}: a reranker: its texts are pairs (want qemb rerank)\n"


def test_bad_models(tmp_path):
    (tmp_path / "bad.qemb").write_bytes(b"x")
    for path in (tmp_path / "bad.qemb", tmp_path / "none"):
        p = rerank(data=jsonl(ask()), model=path)
        assert p.returncode == 2 and p.stdout == b"" and p.stderr.count(b"\n") == 1


def test_info_plan_and_check():
    _, text, _ = run("info", MODEL)
    for line in ("kind             reranker", "attention        causal",
                 "pooling          last token", "longest text     2048 tokens"):
        assert line.encode() + b"\n" in text
    assert b"dense layer" not in text and b", no end-of-text\n" in text
    assert json.loads(re.search(rb'"instruct": (".*")', text)[1]) == TASK
    _, text, _ = run("plan", "-m", MODEL)
    assert re.search(rb"--batch-tokens 2048 \(default\)\n", text) and text.count(b"default") == 1
    status, text, _ = run("check", "-m", MODEL)
    text = text.decode()
    queries, documents = (re.findall(rf"^{k}\d  (.*)$", text, re.M) for k in "qd")
    scores = [float(x) for x in re.findall(r"^q\d\.d\d +(-?[0-9.]+)$", text, re.M)]
    assert status == 0 and len(scores) == 8 and "No expected scores" in text
    pairs = [(q, d) for q in queries[:2] for d in documents[:2]]
    pairs += [(queries[2], d) for d in documents[2:]]
    for (q, d), logit in zip(pairs, scores):
        # seven digits are printed, and a score is rounded to float
        assert abs(alone(q, d) - 1 / (1 + math.exp(-logit))) <= 0.6e-7 / 4 + 2.0**-24


# ---- prompts of embedding models -----------------------------------------------------------------


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """small.qemb with other prompts."""
    f = edit_qemb.Qemb(EMBEDDING)
    f.prompts = {"query": "Query: ", "document": "Passage: ", "STS": "Compare: "}
    return f.write(tmp_path_factory.mktemp("model") / "prompts.qemb")


def test_prompts_by_name(prompted):
    for word in ([], ["tokenize"]):
        of = lambda *args, data=b"What?\n": run(*word, "-m", prompted, *args, data=data)
        prompts = ("Query: ", "Passage: ", "Compare: ", "")
        want = {p: of(data=p.encode() + b"What?\n") for p in prompts}
        assert len({w[1] for w in want.values()}) == 4 and not any(w[0] for w in want.values())
        assert of() == want[""]
        assert of("--query") == of("--prompt", "query") == want["Query: "]
        assert of("--document") == of("--prompt=document") == want["Passage: "]
        assert of("--prompt", "STS") == want["Compare: "]
        record = lambda **kw: jsonl({"text": "What?", **kw})
        jsonl_of = lambda *args, **kw: of(*args, "--input", "jsonl", data=record(**kw))
        assert jsonl_of("--document") == want["Passage: "]
        assert jsonl_of("--document", instruct="") == want[""]


def test_a_prompt_that_is_missing(prompted):
    for name in ("sts", "", "x" * 100):
        for word in ([], ["tokenize"], ["grep", "q"]):
            status, printed, said = run(*word, "-m", prompted, "--prompt", name)
            assert (status, printed) == (2, b"")
            assert said == (f"qemb: {prompted[:128]}: no prompt named {name[:40]} "
                            "(want --prompt with one of: query, document, STS)\n")
    # The demo's file has an empty document prompt, and --document is good without one.
    assert run("-m", EMBEDDING, "--document") == run("-m", EMBEDDING)


def test_a_file_without_prompts(tmp_path):
    f = edit_qemb.Qemb(EMBEDDING)
    f.prompts = {}
    model = f.write(tmp_path / "none.qemb")
    status, _, said = run("-m", model, "--query")
    assert status == 2 and said.endswith(
        ": no prompts in the file (convert the model with --prompt query=TEXT, or give texts "
        "without a prompt)\n")
    assert run("-m", model, "--document") == run("-m", EMBEDDING)


def test_raw_scores_are_logits():
    probabilities, = objects(ask())
    logits, = objects(ask(), args=("--raw-scores",))
    assert [r["index"] for r in logits["results"]] == [r["index"] for r in probabilities["results"]]
    for p, l in zip(probabilities["results"], logits["results"]):
        want = 1 / (1 + math.exp(-l["relevance_score"]))
        assert abs(p["relevance_score"] - want) <= want * 2.0**-24  # rounded to float
    lines = "\n".join(d for d in DOCUMENTS if d and d.isprintable()).encode()
    scored = out("--query", QUERY, "--raw-scores", data=lines).decode().splitlines()
    by_text = {DOCUMENTS[r["index"]]: r["relevance_score"] for r in logits["results"]}
    assert len(scored) > 5
    for line in scored:
        score, text = line.split("\t")
        assert float(score) == by_text[text]


def test_saturated_scores_keep_the_order_of_their_logits(tmp_path):
    """From 17 on a logit's score is the float 1, and documents are still in their order."""
    f = edit_qemb.Qemb(MODEL)
    dense = np.array(f.floats("dense"))
    f.set_dense([(dense * -100).tolist()], [0.0])  # the fixture's logits are below 0
    model = f.write(tmp_path / "large.qemb")
    (got,) = objects(ask(), model=model)
    (logits,) = objects(ask(), args=("--raw-scores",), model=model)
    order = [r["index"] for r in logits["results"]]
    assert sum(r["relevance_score"] == 1 for r in got["results"]) > 5
    assert [r["index"] for r in got["results"]] == order != sorted(order)
    assert [r["index"] for r in objects(ask(top_n=2), model=model)[0]["results"]] == order[:2]
    lines = "\n".join(d for d in DOCUMENTS if d and d.isprintable()).encode()
    by_text = {DOCUMENTS[r["index"]]: r["relevance_score"] for r in logits["results"]}
    printed = rerank("--query", QUERY, data=lines, model=model).stdout.decode().splitlines()
    scores = [by_text[line.split("\t")[1]] for line in printed]
    assert scores == sorted(scores, reverse=True)


def test_objects_as_documents_may_have_other_keys():
    got, = objects(ask(documents=[{"text": "two", "title": "x"}, {"url": 1, "text": "中文"}]))
    assert got["results"] == ranked(QUERY, ["two", "中文"])


def test_one_prompt_at_most(prompted):
    options = [["--query"], ["--document"], ["--prompt", "STS"], ["--instruct", "x"]]
    for i, a in enumerate(options):
        for b in options[:i]:
            status, _, said = run("-m", prompted, *a, *b)
            assert status == 1 and "--query, --document, --prompt and --instruct: only one" in said
    assert run("grep", "-m", prompted, "--prompt", "STS", "--instruct", "x", "q")[0] == 2


def test_prompts_of_grep(prompted, tmp_path):
    """The query has --prompt's, else the query prompt; lines have the document prompt."""
    file = tmp_path / "lines"
    file.write_text("two\nx\nlast words\n")
    vector = lambda text: np.array(json.loads(run("-m", prompted, data=text.encode())[1]))
    lines = {t: vector("Passage: " + t).astype("<f2").astype(float)
             for t in ("two", "x", "last words")}
    index = ["--index", tmp_path / "index"]
    for args, prompt in (([], "Query: "), (["--prompt", "STS"], "Compare: "),
                         (["--prompt", "document"], "Passage: ")):
        p = subprocess.run([QEMB, "-m", prompted, "-0"], input=(prompt + "what").encode(),
                           stdout=subprocess.PIPE, timeout=GUARD)
        query = np.array(json.loads(p.stdout))
        for more in ([], index, index):
            args_of_grep = ["--json", "-m", prompted, *args, *more, "what", file]
            status, printed, said = run("grep", *args_of_grep)
            assert (status, said) == (0, "")
            got = {g["text"]: g["score"] for g in map(json.loads, printed.splitlines())}
            assert got.keys() == lines.keys()
            for text, v in lines.items():
                # a sum of 128 products in float: at most 128 roundings of 2^-24
                assert abs(got[text] - query @ v) < 128 * 2.0**-24


def test_an_index_without_the_prompt_is_stale(prompted, tmp_path):
    """Programs before 'rerank' gave lines no prompt, and have the same version."""
    file, index = tmp_path / "lines", tmp_path / "index"
    file.write_text("two\n")
    # small.qemb's document prompt is empty; 16: no byte order mark in a line
    for model, flags in ((prompted, 24), (EMBEDDING, 16)):
        assert run("grep", "-m", model, "--index", index, "q", file)[0] == 0
        assert struct.unpack_from("<I", index.read_bytes(), 128)[0] == flags
        index.unlink()
