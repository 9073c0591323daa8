"""Models of the second architecture, encoders such as BGE-M3 and multilingual-e5, in both programs:
what `qemb` prints of them, and what qemb-serve answers, alone and beside a model of the first. The
models are random; ids, sums and vectors of transformers are the golden files' matter.

QEMB_BIN and QEMB_SERVE_BIN name the programs, as in test_protocol.py and test_serve.py.
"""
import base64
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys

import encoder_fixture
import numpy as np
import pytest
from edit_qemb import Qemb
from helpers import QEMB, ROOT, SMALL, change_weights, run, stdout_of, tables, vectors_of, wait_for
from serve_client import BUSY, EOS, GUARD, SERVE, Slow, ask, qemb, server, vectors_in
from test_serve_caches import redis, redis_value, wait_stored, with_redis  # noqa: F401
from test_serve_redis import Fake, fake, store, tampered  # noqa: F401
from test_serve_reload import damage, reload, replace

M3 = encoder_fixture.SHAPE | {"max": 200}
E5 = dict(layers=2, hidden=32, heads=2, ffn=48, vocab=450, max=40)
BOS, END = 0, 2
TEXTS = ["the capital of China", "", " ", "Schöne Grüße\n中文 ﬁ", "<s> <mask></s>", "aaa" * 30,
         "two", "two", "a"]
SHORT = [t for t in TEXTS if len(t) < 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


def convert(source, *args):
    run(sys.executable, ROOT / "convert_weights.py", source, "--out", f"{source}.qemb", *args)
    return f"{source}.qemb"


@pytest.fixture(scope="module")
def m3(folder):
    """As BGE-M3: XLM-RoBERTa, the first token's row, bge-m3's tokenizer, two empty prompts."""
    encoder_fixture.save_directory(folder / "m3", M3)
    return convert(folder / "m3", "--prompt", "query=", "--prompt", "document=")


@pytest.fixture(scope="module")
def e5(folder):
    """As multilingual-e5-small: BERT, the mean, E5's tokenizer, a prompt for either side."""
    encoder_fixture.save_directory(folder / "e5", E5, bert=True)
    return convert(folder / "e5", "--prompt", "query=query: ", "--prompt", "passage=passage: ")


@pytest.fixture(scope="module")
def both(m3, e5):
    return m3, e5


def process(model, *args, data=b""):
    return subprocess.run([QEMB, "-m", model, *args], input=data, capture_output=True,
                          timeout=GUARD)


def ids_of(texts, *args, model):
    return [json.loads(line)
            for line in qemb("tokenize", *args, records=[{"text": t} for t in texts], model=model)]


def encoded(texts, *args, model):
    """The vectors in the server's encoding, by ./qemb."""
    return qemb("--output", "base64", *args, records=[{"text": t} for t in texts], model=model)


# ---- qemb ----------------------------------------------------------------------------------------


def test_info(both):
    for model, shape, first, eps in zip(both, (M3, E5), (2, 0), ("1e-05", "1e-12")):
        text = process(model, "info").stdout.decode()
        shapes = encoder_fixture.tensor_shapes(shape, bert=not first)
        count = lambda *starts: sum(math.prod(s) for name, s in shapes.items()
                                    if name.startswith(starts))
        assert {"kind             embedding", "architecture     bert",
                "attention        bidirectional",
                f"pooling          {'first token' if first else 'mean'}",
                f"vector           {shape['hidden']} numbers, fewer by --dim",
                f"parameters       {count('encoder', 'embeddings.LayerNorm')} in the layers, "
                f"{count('embeddings.word')} in the embedding table, "
                f"{count('embeddings.pos')} in the table of positions",
                f"vocabulary       {shape['vocab']} rows, 418 pieces, start-of-text 0, "
                "end-of-text 2", f"longest text     {shape['max']} tokens",
                f"norm eps         {eps}"} <= set(text.splitlines())
        assert "rope" not in text and "merges" not in text
    text = process(SMALL, "info").stdout.decode()
    assert "architecture     qwen3\n" in text and "start-of-text" not in text


def test_tokens_stand_around_every_text(both):
    """The ids of a record may have them or not; a text's own <s> at its beginning counts as one."""
    for model in both:
        lists = ids_of(TEXTS, model=model)
        assert all(ids[0] == BOS and ids[-1] == END for ids in lists)
        assert lists[1] == [BOS, END] and 3 < len(lists[0]) < 40
        text = vectors_of(TEXTS, model=model)
        want = encoded(TEXTS, model=model)
        for begin, end in ((0, None), (1, None), (0, -1), (1, -1)):
            some = [i for i in range(len(TEXTS)) if (begin, end) == (0, None) or i != 4]
            records = [{"ids": lists[i][begin:end]} for i in some]
            got = qemb("--output", "base64", records=records, model=model)
            assert got == [want[i] for i in some]
        # Each number is rounded to a float, so the sum of squares is off by 2 * 2**-24 at most.
        assert (np.abs((text.astype("f8") ** 2).sum(1) - 1) <= 1.01 * 2**-23).all()
        assert (text[6] == text[7]).all() and (text[0] != text[1]).any()


def test_a_long_text_is_cut_between_them(both):
    for model, shape in zip(both, (M3, E5)):
        text, most = "the capital " * 300, shape["max"]
        p = process(model, "tokenize", data=text.encode())
        assert p.returncode == 3
        assert json.loads(p.stdout)["error"] == {
            "code": "too_long", "message": f"text: too long (got more than {most - 2} tokens, want "
            f"at most {most} with the tokens around the text)"}
        (cut,) = ids_of([text], "--truncate", model=model)
        assert len(cut) == most and cut[0] == BOS and cut[-1] == END
        for n in (2, 3, 7):
            got = ids_of([text], "--truncate", "--max-tokens", str(n), model=model)
            assert got == [cut[:n - 1] + [END]]
        p = process(model, "tokenize", "--max-tokens", "1")
        stdout_of(p, 1, r"no room beside the 2 tokens of every text \(got 1, want 2 or more\)")
        p = process(model, "tokenize", "--max-tokens", str(most + 1))
        stdout_of(p, 1, f"more than the model can .got {most + 1}, want 1..{most}")
        p = process(model, "--truncate", "--output", "jsonl", data=text.encode())
        record = json.loads(stdout_of(p))
        assert record["tokens"] == most and record["truncated_bytes"] > 1000


def test_prompts(both):
    m3, e5 = both
    for option, prompt in (["--query"], "query: "), (["--document"], "passage: "), (
            ["--prompt", "passage"], "passage: "), (["--prompt", "document"], "passage: "):
        assert encoded(SHORT, *option, model=e5) == encoded([prompt + t for t in SHORT], model=e5)
    assert encoded(SHORT, "--query", model=e5) != encoded(SHORT, model=e5)
    for option in "--query", "--document":
        assert encoded(SHORT, option, model=m3) == encoded(SHORT, model=m3)


def test_no_tasks(both, tmp_path):
    bare = Qemb(both[0])
    bare.prompts = {}
    for model in *both, bare.write(tmp_path / "bare.qemb"):
        p = process(model, "tokenize", "--instruct", "find it")
        stdout_of(p, 2, re.escape(f"--instruct: the prompts of {model} have no task"))
        p = process(model, "--input", "jsonl", data=b'{"text":"x","instruct":"find it"}')
        assert p.returncode == 3 and json.loads(p.stdout)["error"]["code"] == "no_task"
    stdout_of(process(model, "tokenize", "--query"), 2, "no prompts in the file")
    own = Qemb(both[1])  # as multilingual-e5-large-instruct's might be
    own.prompts = {"query": "Instruct: given a query\nQuery: "}
    assert ids_of(["hi"], "--instruct", "find it", model=own.write(tmp_path / "own.qemb")) == \
        ids_of(["Instruct: find it\nQuery: hi"], model=own.write(tmp_path / "own.qemb"))


def test_bits_do_not_depend_on_the_batch(both):
    texts = [" ".join(TEXTS[0].split()[:i % 4 + 1]) + f" {i}" for i in range(30)] + TEXTS[:5]
    for model in both:
        for table in tables():
            alone = [vectors_of([t], "--cpu", table, model=model)[0]
                     for t in texts[:3] + texts[-3:]]
            for more in (), ("--batch-tokens", "16", "--threads", "2"):
                got = vectors_of(texts, "--cpu", table, *more, model=model)
                assert np.isfinite(got).all()
                assert (got[[0, 1, 2, -3, -2, -1]] == np.array(alone)).all(), (table, more)


def test_shards_tell_models_apart(both, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text("the capital\nof China\n")
    outputs = []
    for model in *both, both[0]:
        p = process(model, "shards", "--out", tmp_path / "out", "--output", "f32", lines)
        stdout_of(p, errors="")
        outputs.append((tmp_path / "out/lines.f32").read_bytes())
        want = vectors_of(["the capital", "of China"], model=model)
        assert outputs[-1] == want.tobytes()


def best_lines(model, *args):
    hits = stdout_of(process(model, "grep", "--json", *args)).splitlines()
    return [(h["text"], h["score"]) for h in map(json.loads, hits)]


def test_grep_and_its_index(both, tmp_path):
    """Query and lines have E5's prompts; an index of another model's vectors is made again."""
    notes, index = tmp_path / "notes", tmp_path / "index"
    notes.write_text("".join(f"{t}\n" for t in SHORT if t.strip() and "\n" not in t))
    for model, ask_by, line_by in (both[1], "query: ", "passage: "), (both[0], "", ""), (
            both[1], "query: ", "passage: "):
        hits = best_lines(model, "where is it", notes)
        lines = [text for text, _ in hits]
        (query,) = vectors_of([ask_by + "where is it"], model=model).astype("f8")
        rows = vectors_of([line_by + t for t in lines], model=model).astype(np.float16)
        # Lines are rounded to halves; of 32 products in float the sum errs by 32 * 2^-24 at most.
        assert np.abs(rows.astype("f8") @ query - [score for _, score in hits]).max() < 2**-19
        assert best_lines(model, "--index", index, "where is it", notes) == hits


def test_the_example_gives_documents_their_prompt(e5):
    texts = ["the capital of China", "people"]
    got = run(sys.executable, ROOT / "examples/python/pipe.py", e5, "where", *texts,
              env=os.environ | {"QEMB": QEMB}).splitlines()
    (query,) = vectors_of(["where"], "--query", model=e5).tolist()
    documents = vectors_of(texts, "--document", model=e5).tolist()
    assert got == [f"{sum(a * b for a, b in zip(query, d)):.4f}  {text}"
                   for d, text in zip(documents, texts)]


def test_no_reranker(both):
    for model in both:
        p = process(model, "rerank", "--query", "x", data=b"y\n")
        stdout_of(p, 2, r"an embedding model, which has no scores \(want a reranker\)")


def test_check_uses_the_models_own_prompts(m3, tmp_path):
    """Its window is too short for E5's. BGE-M3's own scores are in the program."""
    named = Qemb(m3)
    named.prompts = {"query": "query: ", "document": "passage: "}
    for model in m3, named.write(tmp_path / "named.qemb"):
        text = stdout_of(process(model, "check")).decode()
        texts = re.findall(r"^[qd]\d  (.*)$", text, re.M)
        queries = vectors_of(texts[:2], "--query", model=model).astype("f8")
        documents = vectors_of(texts[2:], "--document", model=model).astype("f8")
        scores = [float(x) for x in re.findall(r"^q\d\.d\d +(\S+)$", text, re.M)]
        # seven digits are printed; both computed in double
        assert np.abs((queries @ documents.T).ravel() - scores).max() < 1e-6
        assert "No expected scores are known for a model of this shape." in text


# ---- qemb-serve ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serve_m3(m3):
    with server(model=m3) as s:
        yield s


@pytest.fixture(scope="module")
def serve_e5(e5):
    with server(model=e5) as s:
        yield s


@pytest.fixture
def served(serve_m3, serve_e5, m3, e5):
    return (serve_m3, m3, M3, "cls"), (serve_e5, e5, E5, "mean")


def test_what_the_server_says_of_its_model(served):
    for s, model, shape, pooling in served:
        name = os.path.basename(model).removesuffix(".qemb")
        info = s.request("GET", "/info").json
        assert info["model_type"] == {"embedding": {"pooling": pooling}}
        assert info["max_input_length"] == shape["max"]
        shapes = encoder_fixture.tensor_shapes(shape, bert=pooling == "mean")
        parameters = sum(math.prod(size) for tensor, size in shapes.items()
                         if not tensor.startswith(("pooler", "embeddings.token_type")))
        show = s.post({"model": name}, "/api/show").json
        assert show["model_info"] == {
            "general.architecture": "bert", "general.parameter_count": parameters,
            "bert.context_length": shape["max"], "bert.embedding_length": shape["hidden"]}
        assert show["details"]["family"] == "bert" and show["details"]["families"] == ["bert"]
        assert [m["kind"] for m in s.request("GET", "/v1/models").json["data"]] == ["embedding"]
    with server() as s:
        show = s.post({}, "/api/show").json
        assert show["model_info"]["general.architecture"] == show["details"]["family"] == "qwen3"
        assert s.request("GET", "/info").json["model_type"]["embedding"]["pooling"] == "last_token"


def test_answers_are_those_of_the_pipe(served):
    for s, model, shape, _ in served:
        texts = [t for t, ids in zip(TEXTS, ids_of(TEXTS, "--truncate", model=model))
                 if len(ids) < shape["max"]]
        ids = ids_of(texts, model=model)
        a = s.post(ask(texts, model=None))
        assert vectors_in(a) == encoded(texts, model=model)
        assert a.json["usage"]["total_tokens"] == sum(map(len, ids))
        got = s.post({"input": texts}, "/tokenize").json
        assert [d["tokens"] for d in got["data"]] == ids and got["max_tokens"] == shape["max"]
        assert vectors_in(s.post(ask(ids, model=None))) == encoded(texts, model=model)
        a = s.post(ask(texts, model=None, dimensions=5))
        assert vectors_in(a) == encoded(texts, "--dim", "5", model=model)
        tei = np.array(s.post({"inputs": texts}, "/embed").json)
        assert (tei.astype("f4") == vectors_of(texts, model=model)).all()
        a = s.post(ask(texts, model=None, dimensions=shape["hidden"] + 1))
        assert (a.status, a.error["code"]) == (400, "invalid_dimensions")


def test_ids_of_other_tokenizers(served):
    """Many a tokenizer ends a text with 2, too."""
    for s, _, _, _ in served:
        for ids, said in ([1, 20, 2], "begin with the model's start-of-text (got 1, want 0)"), (
                [0, 20, 3], "end in the model's end-of-text (got 3, want 2)"), (
                [2], "begin with the model's start-of-text (got 2, want 0)"):
            a = s.post(ask([ids], model=None))
            assert (a.status, a.error["code"]) == (400, "foreign_token_ids")
            assert said in a.error["message"]
        assert s.post(ask([[0, 20, 2]], model=None)).status == 200
        a = s.post(ask([[0, s.post(ask(["x"], model=None)).status * 10, 2]], model=None))
        assert (a.status, a.error["code"]) == (400, "invalid_token")


def test_any_ids(m3):
    with server("--allow-token-ids", model=m3) as s:
        want = vectors_in(s.post(ask([[0, 20, 21, 2]], model=None)))
        for ids in [20, 21], [0, 20, 21], [20, 21, 2]:
            assert vectors_in(s.post(ask([ids], model=None))) == want


def test_input_types(served):
    (s3, m3, _, _), (s5, e5, _, _) = served
    for kind, option in ("query", "--query"), ("search_query", "--query"), (
            "document", "--document"), ("passage", "--document"), ("search_document", "--document"):
        a = s5.post(ask(SHORT[:2], model=None, input_type=kind))
        assert vectors_in(a) == encoded(SHORT[:2], option, model=e5), kind
        a = s3.post(ask(SHORT[:2], model=None, input_type=kind))
        assert vectors_in(a) == encoded(SHORT[:2], model=m3), kind
    a = s5.post(ask(["x"], model=None, prompt_name="passage"))
    assert vectors_in(a) == encoded(["x"], "--prompt", "passage", model=e5)
    for s in s3, s5:
        a = s.post(ask(["x"], model=None, instruct="find it"))
        assert (a.status, a.error["code"]) == (400, "no_task")
        a = s.post({"query": "x", "documents": ["y"]}, "/v1/rerank")
        assert (a.status, a.error["code"]) == (400, "wrong_model_kind")


def test_cut_by_the_server(served):
    text = "the capital " * 300
    for s, model, shape, _ in served:
        a = s.post(ask([text], model=None))
        assert (a.status, a.error["code"]) == (400, "context_length_exceeded")
        a = s.post(ask([text], model=None, truncate=True))
        assert vectors_in(a) == encoded([text], "--truncate", model=model)
        assert a.json["data"][0]["truncated_bytes"]
        assert a.json["usage"]["total_tokens"] == shape["max"]
        for n in (9, 2):
            a = s.post({"input": text, "options": {"num_ctx": n}}, "/api/embed").json
            assert a["prompt_eval_count"] == n
        a = s.post({"input": text, "options": {"num_ctx": 1}}, "/api/embed")
        said = "no room beside the 2 tokens of every text (got 1, want 2 or more)"
        assert (a.status, a.json["error"]) == (400, f"options.num_ctx: {said}")
        a = s.post(ask(["x"], model=None, truncate_prompt_tokens=1, truncation_side="right"))
        assert (a.status, a.error["code"]) == (400, "invalid_number")
        assert a.error["message"] == f"truncate_prompt_tokens: {said}"
        assert a.error["param"] == "truncate_prompt_tokens"


def test_plan_counts_the_positions(tmp_path):
    shape = M3 | {"max": 8192}
    encoder_fixture.save_directory(tmp_path / "long", shape)
    model = convert(tmp_path / "long", "--pooling", "first")
    rows = [Qemb(model).sections[name][4] for name in ("tok_emb", "pos_emb")]
    size = sum(len(r) for r in rows) / 2**20
    assert len(rows[1]) > 0.1 * 2**20  # a decimal of what is printed
    said = process(model, "plan").stdout.decode()
    assert f"{size:.1f} MiB  tables of tokens and positions, mapped" in said
    assert "embedding table, mapped" in process(SMALL, "plan").stdout.decode()


# ---- the fallback --------------------------------------------------------------------------------


def test_an_encoder_takes_over_from_a_full_queue(e5):
    """The answer has its tokens, prompt, dimensions and name. What it cannot do gets the first
    model's answer."""
    n, long, cpu = 30, BUSY[1], BUSY[2:]
    with server(*BUSY, "--max-queue", n * long, "--cache", 0, "--fallback", e5) as s:
        count = lambda texts, **more: s.post({"input": texts, **more}, "/tokenize").json["usage"][
            "total_tokens"]
        text = lambda i: f"{i:03}" + "ψ" * 16  # unknown letters: one token of the fallback
        fill = lambda **more: [text(i) for i in range(n * long // count([text(0)], **more))]
        query, document = {"input_type": "query"}, {"input_type": "document"}
        texts, queries = fill(), fill(**query)  # no room for them while a long text waits
        assert all((n - 1) * long < x <= n * long for x in (count(texts), count(queries, **query)))
        words = ["a " * 40, *texts[8:]]
        ids = [[i % 250, i // 250, 1, 1, 1, EOS] for i in range(n * long // 6)]
        s.wait_log("ready", 2)
        slow = Slow(s, n)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        get = lambda texts, **more: s.post(ask(texts, fallback=True, **more))
        assert s.post(ask(texts)).error["code"] == "queue_full"
        plain, asked, told = get(texts), get(queries, dimensions=7, **query), get(texts, **document)
        cut = get(words, truncate=True)
        refused = [get(texts, dimensions=33), get(fill(instruct="find it"), instruct="find it"),
                   get(words), get(ids)]
        assert s.metric("qemb_queue_tokens") > 0, "the queue was to be full all the time"
        assert s.metric("qemb_fallbacks_total") == 4
        assert slow.wait().status == 200
        assert [a.json["model"] for a in (plain, asked, told, cut)] == ["e5"] * 4
        assert vectors_in(plain) == encoded(texts, *cpu, model=e5)
        assert plain.json["usage"]["total_tokens"] == sum(map(len, ids_of(texts, model=e5)))
        assert vectors_in(asked) == encoded(queries, "--query", "--dim", "7", *cpu, model=e5)
        assert vectors_in(told) == encoded(texts, "--document", *cpu, model=e5)
        assert vectors_in(cut) == encoded(words, "--truncate", *cpu, model=e5)
        assert ["truncated_bytes" in d for d in cut.json["data"][:2]] == [True, False]
        assert [(a.status, a.error["code"]) for a in refused] == [(429, "queue_full")] * 4
        own = get(texts[:1])
        assert own.json["model"] == "small" and vectors_in(own) == encoded(texts[:1], *cpu,
                                                                           model=SMALL)
        assert own.headers["x-qemb-fingerprint"] != plain.headers["x-qemb-fingerprint"]


def test_the_second_architecture_may_be_the_first_model(m3, tmp_path):
    main = shutil.copy(m3, tmp_path / "m3.qemb")
    os.utime(main, (10**9, 10**9))
    with server("--query", "--fallback", SMALL, model=main) as s:
        s.wait_log("ready", 2)
        assert vectors_in(s.post(ask(SHORT, model="m3", fallback=True))) == encoded(SHORT, model=m3)
        damage(main)
        s.wait_log("model_changed")
        a = s.post(ask(SHORT, model="m3", fallback=True))
        assert a.json["model"] == "small"
        assert vectors_in(a) == encoded(SHORT, "--query", model=SMALL)
        a = s.post(ask(SHORT, model="m3", fallback=True, instruct="find it"))
        assert a.status == 400 and a.error["code"] == "no_task"  # of the model that was asked
        assert s.post(ask(["x"], model="m3")).error["code"] == "model_changed"


def test_options_that_the_fallback_cannot_follow(m3, e5, tmp_path):
    bare = Qemb(m3)
    bare.prompts = {}
    for model, option, said in (
            (bare.write(tmp_path / "bare.qemb"), "--query", "bare.qemb: no prompts in the file"),
            (e5, "--instruct=find it", "--instruct: the prompts of .*e5.qemb have no task")):
        p = subprocess.run([SERVE, "-m", SMALL, "--port", "0", option, "--fallback", model],
                           capture_output=True, timeout=GUARD)
        stdout_of(p, 2, said)
    p = subprocess.run([SERVE, "-m", SMALL, "--port", "0", "--reranker", m3], capture_output=True,
                       timeout=GUARD)
    stdout_of(p, 1, "--reranker: an embedding model")


# ---- no vector of another model ------------------------------------------------------------------


def same_ids(s, name):
    """Ids that are a text of either model. Without the tokens at their ends, keys have the same."""
    ids = [[BOS, 5], [BOS, 6, 7]]
    end = [EOS] if name == "small" else [END]
    return s.post(ask([i + end for i in ids], model=name))


def test_memory_and_redis_tell_models_apart(redis, m3, e5):
    names = {"small": SMALL, "m3": m3}
    with server(*with_redis(redis.port), "--allow-token-ids", "--fallback", m3) as s:
        s.wait_log("ready", 2)
        want = {name: encoded(SHORT, model=model) for name, model in names.items()}
        for _ in range(2):
            lists = [vectors_in(same_ids(s, name)) for name in names]
            assert [len(base64.b64decode(v[0])) // 4 for v in lists] == [128, M3["hidden"]]
            for name in names:
                a = s.post(ask(SHORT, model=name))
                assert vectors_in(a) == want[name] and a.json["model"] == name
        stored = 2 * (len(set(SHORT)) + 2)
        wait_stored(redis, stored)
    with server(*with_redis(redis.port), "--cache", 0, model=m3) as s:  # what is shared serves
        assert vectors_in(s.post(ask(SHORT, model="m3"))) == want["m3"]
        assert s.metric("qemb_redis_hits_total") == len(SHORT)
        assert s.metric("qemb_redis_bad_values_total") == 0
    with server(*with_redis(redis.port), "--cache", 0, model=e5) as s:
        assert vectors_in(s.post(ask(["two"], model="e5"))) == encoded(["two"], model=e5)
        assert s.metric("qemb_redis_hits_total") == 0


def test_the_longest_vector_of_an_encoder(fake, m3, e5, tmp_path):
    """What Redis has is answered if the model can have computed it. By its last LayerNorm a vector
    of the first token's row is as long as sqrt(D) max|w| + |b| at most."""
    dense = Qemb(e5)
    dense.set_dense([[3.0] * 32, [0.5] * 32, [-2.0] * 32], [1.0, 2.0, 3.0])
    for model in m3, e5, dense.write(tmp_path / "dense.qemb"):
        f = Qemb(model)
        w, b = (np.array(f.floats(f"layers.1.mlp_norm{x}")) for x in ("", "_bias"))
        most = math.sqrt(len(w)) * abs(w).max() + np.linalg.norm(b)
        if f.config["dense_rows"]:
            rows = np.array(f.floats("dense")).reshape(3, 32)
            most = np.linalg.norm(np.linalg.norm(rows, axis=1) * most + f.floats("dense_bias"))
        fake.kept.clear()
        name = os.path.basename(model).removesuffix(".qemb")
        options = ("--cache", 0, *with_redis(fake.port))
        with server(*options, model=model) as s:
            want = vectors_in(s.post(ask(["two"], model=name)))
            wait_for(lambda: len(fake.kept) >= 2, GUARD)  # with the probe's
            good = fake.get
            for length, hit in (0.99 * most, 1), (1.03 * most, 0):
                hits = s.metric("qemb_redis_hits_total")
                fake.get = tampered(lambda v: struct.pack("<f", length) + bytes(len(v) - 4))
                got = vectors_in(s.post(ask(["two"], model=name)))
                assert s.metric("qemb_redis_hits_total") == hits + hit, (name, length)
                assert (got == want) != hit
            fake.get = good


def test_a_reload_from_one_architecture_to_the_other(m3, e5, tmp_path):
    model = tmp_path / "any.qemb"
    shutil.copy(SMALL, model)
    with server("--allow-token-ids", "--redis-check", 0, model=model) as s:
        seen = []
        for file in SMALL, m3, e5, SMALL, change_weights(SMALL, tmp_path / "other.qemb"), m3:
            replace(model, file)
            assert reload(s) == "reloaded"
            for _ in range(2):  # computed, and from the cache
                assert vectors_in(s.post(ask(SHORT, model="any"))) == encoded(SHORT, model=file)
                lists = vectors_in(s.post(ask([[BOS, 5, 6]], model="any")))
            assert lists[0] not in seen[-1:]
            seen.append(lists[0])
        assert seen[0] == seen[3] and seen[1] == seen[5] and len(set(seen)) == 4
        assert s.metric("qemb_cache_misses_total") < s.metric("qemb_cache_hits_total")
