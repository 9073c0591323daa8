"""Embedding models that differ from Qwen3-Embedding: a dense layer, no end-of-text, a window.

Run as a user does, on small.qemb with other fields. QEMB_BIN names the program, as in
test_protocol.py.
"""

import json
import re
import subprocess

import edit_qemb
import numpy as np
import pytest
from helpers import GUARD, QEMB, ROOT

SMALL = ROOT / "tests" / "fixtures" / "small.qemb"
HIDDEN = 128
TEXTS = ["A list of numbers.", "two", "Zwölf Boxkämpfer", "中文", "two", "last"]


def run(model, *args, data="".join(t + "\n" for t in TEXTS).encode(), status=0):
    word = [args[0]] if args and args[0] in ("tokenize", "grep", "info", "check") else []
    command = [QEMB, *word, "-m", str(model), *map(str, args[len(word) :])]
    p = subprocess.run(command, input=data, capture_output=True, timeout=GUARD)
    assert p.returncode == status, p.stderr
    return p.stdout


def vectors(*args, **kw):
    return np.array([json.loads(l) for l in run(*args, **kw).splitlines()])


def edited(path, dense_rows=0, activation=0, **fields):
    """small.qemb with these fields, and a dense layer of random numbers, which it returns."""
    f = edit_qemb.Qemb(SMALL)
    rng = np.random.default_rng(dense_rows)
    weights = rng.standard_normal((dense_rows, HIDDEN)).astype("<f4") / 10
    bias = rng.standard_normal(dense_rows).astype("<f4")
    f.set_dense(weights.tolist(), bias.tolist())
    f.config.update(fields, activation=activation)
    return f.write(path), weights.astype(float), bias.astype(float)


def rows_of(unit, eps_free):
    """The rows of unit vectors: the last norm gives numbers whose mean square, before its weights,
    is 1. That is exact if norm_eps is next to 0."""
    w = np.array(eps_free.floats("final_norm"))
    normed = unit / w
    return normed / np.sqrt(np.mean(normed**2, axis=1, keepdims=True)) * w


def test_a_task_has_the_form_of_the_models_prompts():
    """F2LLM was trained with a space behind "Query:", Qwen3-Embedding without. A file without
    prompts is taken for a fine-tune of that one. Prompts of another form have no task."""
    golden = ROOT / "tests" / "golden"
    for name, behind in (("f2llm", " "), ("harrier", ""), ("octen", ""), ("hf-tiny", "")):
        model = golden / f"{name}.qemb"
        text = json.dumps({"text": f"Instruct: find it\nQuery:{behind}hi"}).encode()
        want = run(model, "tokenize", "--input", "jsonl", data=text)
        assert run(model, "tokenize", "--instruct", "find it", data=b"hi") == want
        record = json.dumps({"text": "hi", "instruct": "find it"}).encode()
        assert run(model, "tokenize", "--input", "jsonl", data=record) == want
    for name in ("voyage", "jina-v5"):
        model = golden / f"{name}.qemb"
        run(model, "tokenize", "--instruct", "find it", status=2)
        got = json.loads(run(model, "--input", "jsonl", data=record, status=3))
        assert got["error"]["code"] == "no_task"
        bare = b'{"text": "hi", "instruct": ""}'
        assert run(model, "tokenize", "--input", "jsonl", data=bare) == run(
            model, "tokenize", data=b"hi")
        run(model, "check")


@pytest.mark.parametrize("rows", (3, 200))
@pytest.mark.parametrize("activation", (0, 1), ids=("identity", "tanh"))
def test_dense_layer(tmp_path, rows, activation):
    """Against the vectors of the model without it. A number of a vector is a float, with an error
    of 2^-24 or less; a row of them errs by |row| 2^-24 kappa, kappa being how much the norm's
    weights differ; the layer multiplies that by at most its norm, and scaling to length 1 divides
    it by the vector's length, at most twice."""
    plain, _, _ = edited(tmp_path / "plain.qemb", norm_eps=1e-12)
    model, weights, bias = edited(tmp_path / "dense.qemb", rows, activation, norm_eps=1e-12)
    f = edit_qemb.Qemb(plain)
    row = rows_of(vectors(plain), f)
    y = row @ weights.T + bias
    y = np.tanh(y) if activation else y
    w = abs(np.array(f.floats("final_norm")))
    off = np.linalg.norm(row, axis=1) * 2.0**-24 * np.sqrt(HIDDEN) * w.max() / w.min()
    length = np.linalg.norm(y, axis=1)
    bound = 2 * off * np.linalg.norm(weights, 2) / length + 2.0**-23
    got = vectors(model)
    assert got.shape == (len(TEXTS), rows) and (bound < 1e-3).all()
    assert (np.linalg.norm(got - y / length[:, None], axis=1) <= bound).all()
    one = b"".join(run(model, data=t.encode()) for t in TEXTS)
    assert one == run(model) == run(model, "--batch-tokens", 1, "--threads", 2)


def test_dim_of_a_dense_layer(tmp_path):
    model, *_ = edited(tmp_path / "dense.qemb", 200, 1)
    whole = vectors(model)
    for dim in (1, 128, 199, 200):
        cut = whole[:, :dim] / np.linalg.norm(whole[:, :dim], axis=1, keepdims=True)
        got = vectors(model, "--dim", dim)
        assert got.shape == (len(TEXTS), dim) and abs(got - cut).max() < 2.0**-22
    assert run(model, "--dim", 201, status=1) == b""
    record = json.dumps({"text": "two", "dim": 200}).encode()
    assert run(model, "--input", "jsonl", data=record) == run(model, data=b"two")
    record = json.dumps({"text": "two", "dim": 201}).encode()
    assert b"want 1..200" in run(model, "--input", "jsonl", data=record, status=3)
    zeros = run(model, "--output", "f32", "--on-error", "zero", data=b"\xff\ntwo", status=3)
    assert zeros[:800] == bytes(800) and len(zeros) == 1600
    assert b"dense layer      200 rows, tanh\n" in run(model, "info")
    assert b"dense layer      3 rows\n" in run(edited(tmp_path / "d.qemb", 3)[0], "info")


def test_check_and_grep_with_a_dense_layer(tmp_path):
    """More numbers than the hidden size; fewer."""
    for rows in (200, 3):
        model, *_ = edited(tmp_path / "dense.qemb", rows)
        scores = re.findall(rb"^q\d\.d\d +(-?[0-9.]+)$", run(model, "check"), re.M)
        asked = b"What is the capital of China?\nExplain gravity\n"
        queries = vectors(model, "--query", data=asked)
        document = vectors(model, data=b"The capital of China is Beijing.\n")[0]
        # seven digits are printed, of sums of products of floats
        assert abs(float(scores[0]) - queries[0] @ document) < 0.6e-7
        assert abs(float(scores[2]) - queries[1] @ document) < 0.6e-7
        file = tmp_path / "lines"
        file.write_text("".join(t + "\n" for t in TEXTS))
        args = ("grep", "-k", 9, "--json", "two", file)
        want = run(model, *args)
        assert want.count(b"\n") == len(TEXTS)
        for _ in range(2):  # the index is made, and read
            assert run(model, *args, "--index", tmp_path / f"{rows}") == want


def test_without_end_of_text(tmp_path):
    model, *_ = edited(tmp_path / "none.qemb", eos_id=edit_qemb.NO_TOKEN)
    texts = b"two\n\nlast\n"
    ids = lambda m: [json.loads(l) for l in run(m, "tokenize", data=b"two\nlast\n").splitlines()]
    assert [i + [2557] for i in ids(model)] == ids(SMALL)
    for word in ((), ("tokenize",)):
        got = run(model, *word, data=texts, status=3).splitlines()
        assert [got[0], got[2]] == run(model, *word, data=b"two\nlast\n").splitlines()
        error = json.loads(got[1])
        assert error["line"] == 2 and error["error"]["code"] == "empty_text"
    assert len(run(model, "--query", data=texts).splitlines()) == 3  # a prompt is enough
    of_ids = run(model, "--input", "jsonl", data=json.dumps({"ids": ids(model)[0]}).encode())
    assert of_ids == run(model, data=b"two")
    empty = run(model, "--input", "jsonl", data=b'{"ids":[]}', status=3)
    assert json.loads(empty)["error"]["code"] == "empty_text"
    assert b", no end-of-text\n" in run(model, "info")
    assert run(model, "grep", "--json", "two", data=texts).count(b"\n") == 2


def test_the_window(tmp_path):
    model, *_ = edited(tmp_path / "window.qemb", window=20)
    long = b"one two three four five six seven eight nine ten eleven twelve\n"
    assert len(json.loads(run(SMALL, "tokenize", data=long))) > 20
    error = json.loads(run(model, data=long, status=3))["error"]
    assert error["code"] == "too_long" and "at most 20 " in error["message"]
    assert len(json.loads(run(model, "tokenize", "--truncate", data=long))) == 20
    assert run(model, "--max-tokens", 2048, data=long) == run(SMALL, data=long)
    assert b"longest text     20 tokens, up to 2048 by --max-tokens\n" in run(model, "info")
    # The example is longer than that.
    assert run(model, "check", status=2) == b""
