"""Reranking in qemb-serve: `qemb rerank`'s scores, the public APIs and their clients."""

import contextlib
import json
import math
import shutil
import signal
import struct
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cohere
import edit_qemb
import pytest
from helpers import wait_for
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from serve_client import (
    BUSY,
    GUARD,
    JSON,
    MODEL,
    OK,
    QEMB,
    ROOT,
    SANITIZED,
    SERVE,
    TEXTS,
    TINY,
    Answer,
    Server,
    server,
    vectors_of,
)
from test_serve_caches import (  # noqa: F401 - redis is a fixture
    redis,
    redis_value,
    wait_stored,
    with_redis,
)

RERANKER = str(ROOT / "tests" / "fixtures" / "reranker.qemb")
PATHS = ["/v1/rerank", "/v2/rerank", "/rerank"]
ALIASES = ["/v1/reranking", "/reranking"]  # llama.cpp's server has them too
QUERY = "Which planet is red?"
ASK = {"query": QUERY, "documents": ["one"]}


@contextlib.contextmanager
def with_reranker(*args, file=RERANKER):
    """A server with a model that embeds and a reranker, both ready."""
    with server("--reranker", file, *args) as s:
        s.wait_log("ready", 2)
        yield s


@pytest.fixture(scope="module")
def both():
    with with_reranker() as s:
        yield s


def exact(body):
    """The JSON with its numbers as they are written: equal ones are equal to the bit."""
    return json.loads(body, parse_float=str)


def qemb_rerank(records, *args):
    """What `qemb rerank` prints for JSON records."""
    data = "".join(json.dumps(r) + "\n" for r in records).encode()
    command = [QEMB, "rerank", "-m", RERANKER, *args]
    done = subprocess.run(command, input=data, stdout=subprocess.PIPE, timeout=GUARD)
    assert done.returncode == 0
    return [exact(line) for line in done.stdout.splitlines()]


def ranked(query, documents, *args, **more):
    return qemb_rerank([{"query": query, "documents": documents, **more}], *args)[0]


def scores(query, documents, *args, **more):
    """The scores, as written, in the order of the documents."""
    results = ranked(query, documents, *args, **more)["results"]
    return [r["relevance_score"] for r in sorted(results, key=lambda r: r["index"])]


def results_in(a):
    assert a.status == 200, a.body
    return exact(a.body)["results"]


# ---- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS + ALIASES)
def test_scores_are_qembs_bit_for_bit(both, path):
    want = ranked(QUERY, TEXTS)
    for documents in (
        TEXTS,
        [{"text": t} for t in TEXTS],
        [TEXTS[0], *map(lambda t: {"text": t}, TEXTS[1:])],
    ):
        for more in ({}, {"model": "reranker"}):
            a = both.post({"query": QUERY, "documents": documents, **more}, path)
            assert results_in(a) == want["results"]
            got = a.json
            assert got["usage"] == {"prompt_tokens": want["tokens"], "total_tokens": want["tokens"]}
            assert got["object"] == "list" and got["model"] == "reranker"
            assert got["id"] == a.headers["x-request-id"]
            assert got["meta"]["billed_units"] == {"search_units": 1}
            assert got["meta"]["api_version"] == {"version": "2" if "v2" in path else "1"}
    order = [r["index"] for r in want["results"]]
    assert order != sorted(order) and order.index(2) == order.index(3) - 1  # "two" twice


def test_tei_form(both):
    want = [
        {"index": r["index"], "score": r["relevance_score"]}
        for r in ranked(QUERY, TEXTS)["results"]
    ]
    body = {"query": QUERY, "texts": TEXTS}
    assert exact(both.post(body, "/rerank").body) == want
    more = {
        "raw_scores": False,
        "return_text": True,
        "truncation_direction": "Right",
        "top_n": None,
    }
    a = both.post({**body, **more, "truncate": True, "model": None}, "/rerank")
    assert exact(a.body) == [{**r, "text": TEXTS[r["index"]]} for r in want]
    raw = both.post({**body, "raw_scores": True, "truncation_direction": "right"}, "/rerank").json
    assert [r["index"] for r in raw] == [r["index"] for r in want]
    f32 = lambda x: struct.unpack("f", struct.pack("f", x))[0]
    for r, w in zip(raw, want):
        assert f32(1 / (1 + math.exp(-f32(r["score"])))) == f32(float(w["score"]))
    top = both.post({**body, "top_n": 3}, "/rerank")
    assert exact(top.body) == want[:3]


def test_logits_of_documents(both):
    """vLLM's use_activation is the opposite of raw_scores."""
    raw = both.post({"query": QUERY, "texts": TEXTS, "raw_scores": True}, "/rerank")
    logits = [(r["index"], r["score"]) for r in exact(raw.body)]
    scores = [(r["index"], r["relevance_score"]) for r in ranked(QUERY, TEXTS)["results"]]
    for more, want in (
        ({"raw_scores": True}, logits),
        ({"raw_scores": True, "use_activation": None}, logits),
        ({"raw_scores": False}, scores),
        ({"use_activation": False}, logits),
        ({"use_activation": True}, scores),
    ):
        got = results_in(both.post({"query": QUERY, "documents": TEXTS, **more}, "/v1/rerank"))
        assert [(r["index"], r["relevance_score"]) for r in got] == want


def test_top_n_and_documents(both):
    want = ranked(QUERY, TEXTS)["results"]
    for top_n, n in (
        (1, 1),
        (3, 3),
        (len(TEXTS), len(TEXTS)),
        (2**40, len(TEXTS)),
        (0, len(TEXTS)),
    ):
        for path in PATHS:
            body = {"query": QUERY, "documents": TEXTS, "top_n": top_n, "return_documents": True}
            got = results_in(both.post(body, path))
            assert got == [{**r, "document": {"text": TEXTS[r["index"]]}} for r in want[:n]]


def test_a_hundred_documents_are_a_search_unit(both):
    for n, units in ((100, 1), (101, 2)):
        a = both.post({"query": "q", "documents": ["x"] * n, "top_n": 1}, "/v2/rerank")
        assert a.json["meta"]["billed_units"]["search_units"] == units


KEYS = (
    "model top_n return_documents max_tokens_per_doc truncate truncation instruct instruction "
    "raw_scores use_activation rank_fields max_chunks_per_doc user priority"
).split()
TEI_KEYS = (
    "model top_n return_text raw_scores truncate truncation_direction instruct user priority"
).split()


def test_a_misspelt_key_is_told_the_right_one(both):
    """Other unknown keys are no error."""
    tei = {"query": "q", "texts": ["x"]}
    for body, path in ((ASK, "/v1/rerank"), (tei, "/rerank")):
        a = both.post({**body, "topn": 1}, path)
        assert a.status in (400, 422) and "topn: unknown (want top_n?)" in a.body.decode()
        assert both.post({**body, "colour": 1}, path).status == 200


def test_null_counts_as_not_given(both):
    nulls = dict.fromkeys([*KEYS, "truncate_prompt_tokens"])
    body = {"query": QUERY, "documents": TEXTS, **nulls}
    for path in PATHS:
        assert results_in(both.post(body, path)) == ranked(QUERY, TEXTS)["results"]
    body = {"query": QUERY, "texts": TEXTS, **dict.fromkeys(TEI_KEYS)}
    assert both.post(body, "/rerank").status == 200
    assert both.post({**ASK, "user": "u", "priority": 3}, "/v2/rerank").status == 200


def test_cohere_v1_documents_with_other_keys(both):
    """Only "text" is ranked and returned, as with Cohere's default for rank_fields."""
    want = ranked(QUERY, TEXTS)["results"]
    objects = [{"title": "t", "text": t, "n": {"text": 5}} for t in TEXTS]
    body = {"query": QUERY, "documents": objects}
    more = {"rank_fields": ["text"], "max_chunks_per_doc": 3, "return_documents": True}
    for path in PATHS:
        assert results_in(both.post(body, path)) == want
        got = results_in(both.post({**body, **more}, path))
        assert got == [{**r, "document": {"text": TEXTS[r["index"]]}} for r in want]


def test_instruct(both):
    want = scores(QUERY, TEXTS, instruct="Find a planet")
    assert want != scores(QUERY, TEXTS)
    a = both.post({"query": QUERY, "documents": TEXTS, "instruct": "Find a planet"}, "/v1/rerank")
    assert [r["relevance_score"] for r in sorted(results_in(a), key=lambda r: r["index"])] == want
    a = both.post({**ASK, "documents": TEXTS, "instruction": "Find a planet"}, "/v1/rerank")
    assert [r["relevance_score"] for r in sorted(results_in(a), key=lambda r: r["index"])] == want
    a = both.post({"query": QUERY, "texts": TEXTS, "instruct": "Find a planet"}, "/rerank")
    assert [r["score"] for r in sorted(exact(a.body), key=lambda r: r["index"])] == want


def test_truncate(both):
    long = "word " * 20000
    want = ranked(QUERY, ["x", long], "--truncate")
    for key in ("truncate", "truncation"):
        body = {"query": QUERY, "documents": ["x", long], key: True}
        assert results_in(both.post(body, "/v1/rerank")) == want["results"]
        a = both.post({**body, key: False}, "/v1/rerank")
        assert (a.status, a.json["error"]["code"]) == (400, "context_length_exceeded")
        assert a.json["error"]["message"].startswith("documents[1]:")
    a = both.post({"query": QUERY, "texts": ["x", long]}, "/rerank")
    assert a.status == 422 and a.json["error"].startswith("texts[1]:")
    a = both.post({"query": QUERY, "texts": ["x", long], "truncate": True}, "/rerank")
    assert a.status == 200 and all(set(r) == {"index", "score"} for r in a.json)


def test_a_cut_document_says_so(both):
    """Where the document was truncated; a limit of the request's own is no news."""
    body = {"query": QUERY, "documents": ["x", "word " * 20000], "return_documents": True}
    cut_of = lambda results: {r["index"]: r.get("truncated_bytes") for r in results}
    want = cut_of(ranked(QUERY, body["documents"], "--truncate")["results"])
    assert want[0] is None and want[1] > 0
    for _ in range(2):  # the second time from the cache
        assert cut_of(results_in(both.post({**body, "truncate": True}, "/v2/rerank"))) == want
    a = both.post({**body, "max_tokens_per_doc": 5}, "/v2/rerank")
    assert all("truncated_bytes" not in r for r in results_in(a))


def test_max_tokens_per_doc(both):
    body = {"query": QUERY, "documents": ["", "a b c d", "a b c e", "word " * 20000]}
    body["max_tokens_per_doc"] = 2
    a = both.post({**body, "documents": body["documents"][:1]}, "/v2/rerank")
    prompt = a.json["usage"]["total_tokens"]
    a = both.post(body, "/v2/rerank")
    by_index = {r["index"]: r["relevance_score"] for r in results_in(a)}
    assert by_index[1] == by_index[2] != by_index[0]
    # the empty document is a space, a token; the others have two
    assert a.json["usage"]["total_tokens"] == prompt + 3 * (prompt + 1)
    a = both.post(
        {**body, "documents": body["documents"][:3], "max_tokens_per_doc": 100}, "/v2/rerank"
    )
    assert results_in(a) == ranked(QUERY, body["documents"][:3])["results"]


def test_a_long_query_is_tokenized_to_the_limit(both):
    """With a limit of the document too: a hundred documents with a query of a megabyte."""
    body = {"query": "word " * 200000, "documents": ["x"] * 100, "max_tokens_per_doc": 5}
    a = both.post(body, "/v2/rerank")
    assert (a.status, a.json["error"]["code"]) == (400, "context_length_exceeded")


# ---- errors --------------------------------------------------------------------------------------

BAD = [
    (b"", 400, "invalid_json", None),
    (b'{"query":"q","query":"r","documents":["x"]}', 400, "invalid_json", None),
    (b'{"query":"\xff","documents":["x"]}', 400, "invalid_json", None),
    ([], 400, "invalid_json", None),
    ({"documents": ["x"]}, 400, "missing_parameter", "query"),
    ({**ASK, "query": None}, 400, "missing_parameter", "query"),
    ({"query": "q"}, 400, "missing_parameter", "documents"),
    ({**ASK, "query": ["q"]}, 400, "invalid_type", "query"),
    ({**ASK, "documents": None}, 400, "missing_parameter", "documents"),
    ({**ASK, "documents": "x"}, 400, "invalid_type", "documents"),
    ({**ASK, "documents": []}, 400, "empty_input", "documents"),
    ({**ASK, "documents": ["x", None]}, 400, "invalid_type", "documents"),
    ({**ASK, "documents": [{"text": 1}]}, 400, "invalid_type", "documents"),
    ({**ASK, "documents": [{"image": "x"}]}, 400, "invalid_type", "documents"),
    ({**ASK, "documents": ["x"] * 2049}, 400, "too_many_inputs", "documents"),
    ({**ASK, "model": 1}, 400, "invalid_type", "model"),
    ({**ASK, "model": "rerank-v3.5"}, 404, "model_not_found", "model"),
    ({**ASK, "model": "small"}, 400, "wrong_model_kind", "model"),
    ({**ASK, "top_n": -1}, 400, "invalid_number", "top_n"),
    ({**ASK, "top_n": "1"}, 400, "invalid_type", "top_n"),
    ({**ASK, "max_tokens_per_doc": 0}, 400, "invalid_number", "max_tokens_per_doc"),
    ({**ASK, "return_documents": 1}, 400, "invalid_type", "return_documents"),
    ({**ASK, "truncate": "x"}, 400, "invalid_truncation", "truncate"),
    ({**ASK, "truncation": 1}, 400, "invalid_type", "truncation"),
    ({**ASK, "instruct": 1}, 400, "invalid_type", "instruct"),
    ({**ASK, "rank_fields": ["title"]}, 400, "invalid_rank_fields", "rank_fields"),
    ({**ASK, "rank_fields": ["text", "title"]}, 400, "invalid_rank_fields", "rank_fields"),
    ({**ASK, "rank_fields": []}, 400, "invalid_rank_fields", "rank_fields"),
    ({**ASK, "rank_fields": "text"}, 400, "invalid_type", "rank_fields"),
    ({**ASK, "max_chunks_per_doc": 0}, 400, "invalid_number", "max_chunks_per_doc"),
    ({**ASK, "max_chunks_per_doc": "2"}, 400, "invalid_type", "max_chunks_per_doc"),
    ({**ASK, "truncate_prompt_tokens": 5}, 400, "unknown_parameter", "truncate_prompt_tokens"),
    ({**ASK, "raw_scores": 1}, 400, "invalid_type", "raw_scores"),
    ({**ASK, "use_activation": 1}, 400, "invalid_type", "use_activation"),
    ({**ASK, "instruction": 1}, 400, "invalid_type", "instruction"),
    ({**ASK, "return_document": True}, 400, "unknown_parameter", "return_document"),
    ({**ASK, "instruction": "T", "instruct": "T"}, 400, "conflicting_parameters", "instruction"),
    ({**ASK, "truncation": True, "truncate": True}, 400, "conflicting_parameters", "truncation"),
    (
        {**ASK, "raw_scores": True, "use_activation": False},
        400,
        "conflicting_parameters",
        "use_activation",
    ),
]


@pytest.mark.parametrize("body,status,code,param", BAD)
def test_bad_requests(both, body, status, code, param):
    for path in PATHS:
        a = both.post(body, path)
        assert (a.status, a.error["code"], a.error["param"]) == (status, code, param)
        assert a.json["message"] == a.json["detail"] == a.error["message"]


@pytest.mark.parametrize(
    "more,message",
    [
        (
            {"documents": ["x", 5]},
            'documents[1]: wrong type (got an integer, want a string or an object with "text")',
        ),
        (
            {"documents": [{"title": "x"}]},
            "documents[0].text: wrong type (got nothing, want a string)",
        ),
        (
            {"documents": [{"text": None, "title": "x"}]},
            "documents[0].text: wrong type (got null, want a string)",
        ),
        (
            {"truncate_prompt_tokens": 5},
            "truncate_prompt_tokens: not served (got an integer, want null, or max_tokens_per_doc)",
        ),
        (
            {"rank_fields": ["text", "title"]},
            'rank_fields: not served (got ["text","title"], want ["text"])',
        ),
    ],
)
def test_messages(both, more, message):
    assert both.post({**ASK, **more}, "/v1/rerank").error["message"] == message


TEI = {"query": "q", "texts": ["x"]}
TEI_BAD = [
    ({"texts": ["x"]}, 422, "Validation"),
    ({**TEI, "texts": []}, 400, "Empty"),
    ({**TEI, "texts": [{"text": "x"}]}, 422, "Validation"),
    ({**TEI, "texts": ["x"] * 2049}, 422, "Validation"),
    ({**TEI, "documents": ["x"]}, 422, "Validation"),
    ({**TEI, "return_texts": True}, 422, "Validation"),
    ({**TEI, "truncation_direction": "Left"}, 422, "Validation"),
    ({**TEI, "raw_scores": 1}, 422, "Validation"),
    ({**TEI, "model": "other"}, 404, "Validation"),
]


@pytest.mark.parametrize("body,status,error_type", TEI_BAD)
def test_bad_requests_of_tei(both, body, status, error_type):
    a = both.post(body, "/rerank")
    assert (a.status, a.json["error_type"]) == (status, error_type) and a.json["error"]
    assert set(a.json) == {"error", "error_type"}


def test_texts_are_for_one_path(both):
    for path in PATHS[:2]:
        assert both.post(TEI, path).error["code"] == "unknown_parameter"


def test_other_paths_are_told_the_paths(both):
    a = both.post(ASK, "/v1/ranking")
    assert (a.status, a.error["code"]) == (404, "unknown_url")
    listed = a.error["message"].split("(want ")[1].rstrip(")").replace(" or ", ", ").split(", ")
    assert set(PATHS + ALIASES) < set(listed)
    for path in listed:
        assert both.request("GET", path).status in (200, 405)


def test_reranking_is_rerank(both):
    """In errors, in the form of text-embeddings-inference, and in the counters."""
    assert both.post({"query": "q", "texts": ["x"]}, "/reranking").json[0]["index"] == 0
    assert both.post(TEI, "/v1/reranking").error["code"] == "unknown_parameter"
    paths = {dict(k[1])["path"] for k in both.metrics() if k[0] == "qemb_requests_total"}
    assert "/rerank" in paths and not paths & set(ALIASES)


def test_paths_and_methods(both):
    for path in PATHS + ALIASES:
        a = both.request("GET", path)
        assert (a.status, a.headers["Allow"]) == (405, "POST")
        assert both.post(ASK, path, {"Content-Type": "text/plain"}).status == 415


def test_models_of_another_kind(both):
    models = both.request("GET", "/v1/models").json["data"]
    kinds = [(m["id"], m["kind"]) for m in models]
    assert kinds == [("small", "embedding"), ("reranker", "reranker")]
    assert [m.id for m in both.openai().models.list()] == ["small", "reranker"]
    for path in ("/v1/embeddings", "/tokenize"):
        a = both.post({**OK, "model": "reranker"}, path)
        assert (a.status, a.error["code"]) == (400, "wrong_model_kind")
    assert both.embed(["x"]) == vectors_of(["x"], MODEL)
    assert both.request("GET", "/health").json == {"status": "ok", "reranker": "ok"}
    with server() as s:
        for body, path in [(ASK, p) for p in PATHS] + [({**ASK, "model": "small"}, "/v1/rerank")]:
            a = s.post(body, path)
            assert (a.status, a.error["code"]) == (400, "wrong_model_kind")
        a = s.post(TEI, "/rerank")
        assert (a.status, a.json["error_type"]) == (422, "Validation")


def test_a_reranker_alone():
    task = ("--instruct", "Find a planet")
    with server("--name", "one", "--name", "two", *task, model=RERANKER) as s:
        want = ranked(QUERY, TEXTS, *task)["results"]
        for name in ("one", "two", None):
            a = s.post({"query": QUERY, "documents": TEXTS, "model": name}, "/v1/rerank")
            assert results_in(a) == want and a.json["model"] == "one"
        for path in ("/v1/embeddings", "/tokenize"):
            a = s.post({**OK, "model": "one"}, path)
            assert (a.status, a.error["code"]) == (400, "wrong_model_kind")
            assert "no embedding model" in a.error["message"]
        models = s.request("GET", "/v1/models").json["data"]
        kinds = [(m["id"], m["kind"]) for m in models]
        assert kinds == [("one", "reranker"), ("two", "reranker")]
        assert s.request("GET", "/health").json == {"status": "ok"}


def test_three_models():
    """The fallback embeds. --instruct is for both kinds of model, --max-tokens for the first."""
    task = ("--instruct", "T")
    others = ("--fallback", TINY, "--reranker", RERANKER, "--reranker-name", "r")
    with server(*others, *task, "--max-tokens", 20) as s:
        s.wait_log("ready", 3)
        a = s.post({"query": QUERY, "documents": TEXTS, "model": "r"}, "/v1/rerank")
        assert results_in(a) == ranked(QUERY, TEXTS, *task)["results"]
        assert s.embed(["x"]) == vectors_of(["x"], MODEL, *task)
        assert s.post({**OK, "model": "hf-tiny"}).json["model"] == "hf-tiny"
        assert s.post({**ASK, "model": "hf-tiny"}, "/v1/rerank").error["code"] == "wrong_model_kind"
        roles = [(dict(k[1])["role"], dict(k[1])["model"]) for k in s.metrics() if "info" in k[0]]
        assert roles == [("main", "small"), ("fallback", "hf-tiny"), ("reranker", "r")]
        states = {"status": "ok", "fallback": "ok", "reranker": "ok"}
        assert s.request("GET", "/health").json == states


def test_reranker_max_tokens():
    """--max-tokens is of the first model alone."""
    with with_reranker("--max-tokens", 20, "--reranker-max-tokens", 200) as s:
        body = {"query": QUERY, "documents": ["x", "word " * 150]}
        a = s.post(body, "/v1/rerank")
        assert (a.status, a.error["code"]) == (400, "context_length_exceeded")
        assert a.error["message"].startswith("documents[1]:") and "200" in a.error["message"]
        args = ("--max-tokens", "200", "--truncate")
        want = ranked(*body.values(), *args)
        a = s.post({**body, "truncate": True}, "/v1/rerank")
        assert a.json["usage"]["total_tokens"] == want["tokens"]
        got = [(r["index"], r["relevance_score"]) for r in results_in(a)]
        assert got == [(r["index"], r["relevance_score"]) for r in want["results"]]
        assert s.post({**OK, "input": "word " * 20}).error["code"] == "context_length_exceeded"


BESIDE = ("-m", MODEL, "--reranker", RERANKER)


@pytest.mark.parametrize(
    "args,status,message",
    [
        (("-m", MODEL, "--reranker", "/nowhere"), 2, "/nowhere"),
        (("-m", MODEL, "--reranker", MODEL, "--reranker-name", "r"), 1, "--reranker: an embedding"),
        (("-m", MODEL, "--fallback", RERANKER), 1, "--fallback: a reranker"),
        (("-m", MODEL, "--reranker-name", "r"), 1, "no model"),
        (("-m", MODEL, "--reranker", RERANKER, "--reranker-name", "small"), 1, "own name"),
        (("-m", MODEL, "--reranker", RERANKER, "--reranker-name", ""), 1, "bad length"),
        (
            ("-m", MODEL, "--fallback", TINY, "--reranker", RERANKER, "--reranker-name", "hf-tiny"),
            1,
            "fallback's name",
        ),
        (("-m", RERANKER, "--fallback", TINY), 1, "beside an embedding model"),
        (
            ("-m", RERANKER, "--reranker", RERANKER, "--reranker-name", "r"),
            1,
            "beside an embedding",
        ),
        (("-m", RERANKER, "--query"), 1, "not for a reranker"),
        (("-m", RERANKER, "--document"), 1, "not for a reranker"),
        (("-m", RERANKER, "--prompt", "query"), 1, "not for a reranker"),
        (("-m", RERANKER, "--max-tokens", "5"), 1, "no room"),
        ((*BESIDE, "--reranker-max-tokens", "5"), 1, "no room"),
        ((*BESIDE, "--reranker-max-tokens", "99999999"), 1, "--reranker-max-tokens: more than"),
        (("-m", RERANKER, "--reranker-max-tokens", "500"), 1, "want --reranker)"),
    ],
)
def test_usage(args, status, message):
    p = subprocess.run([SERVE, *args, "--port", "0"], stderr=subprocess.PIPE, timeout=GUARD)
    assert p.returncode == status and message in p.stderr.decode()


def test_api_keys(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    with server("--api-key-file", keys, model=RERANKER) as s:
        for path in PATHS:
            a = s.post(ASK, path)
            assert a.status == 401 and a.json["detail"] == a.json["message"]
            assert s.post(ASK, path, {**JSON, "Authorization": "Bearer key"}).status == 200
        client = cohere.ClientV2("wrong", base_url=f"http://127.0.0.1:{s.port}")
        with pytest.raises(cohere.UnauthorizedError):
            client.rerank(model="reranker", **ASK)


# ---- limits --------------------------------------------------------------------------------------


def documents(n, start=0, words=10 if SANITIZED else 40):
    """Documents of a hundred tokens and more, all different."""
    return [f"{start + i} " + " ".join(f"{start + i}w{k}" for k in range(words)) for i in range(n)]


class Ranking:
    """Sends a request that keeps the reranker busy, in a thread."""

    def __init__(self, s, n=10, start=0, path="/v1/rerank", **more):
        self.body = {"query": f"query {start}", "documents": documents(n, start), **more}
        self.c = s.connect()
        self.c.request("POST", path, json.dumps(self.body), JSON)

    def wait(self):
        a = Answer(self.c.getresponse())
        self.c.close()
        return a


def test_limits():
    with server("--max-texts", 20, "--max-queue", 1000, model=RERANKER) as s:
        ask = lambda n: s.post(
            {"query": "q", "documents": [str(i) for i in range(n)]}, "/v1/rerank"
        )
        fits = 1000 // ask(1).json["usage"]["total_tokens"]  # a digit is a token
        assert 1 < fits < 20 and ask(fits).status == 200
        for n, status, code in (
            (fits + 1, 413, "too_many_tokens"),
            (21, 400, "too_many_inputs"),
        ):
            a = ask(n)
            assert (a.status, a.error["code"], a.error["param"]) == (status, code, "documents")
        want = "1000, the server's --max-queue)"
        assert want in (message := ask(fits + 1).error["message"])
        assert "with prompt and query once for each document" in message


def test_full_queue_and_deadline():
    with server(*BUSY, "--max-queue", 6000, "--deadline", 1, model=RERANKER) as s:
        waiting = [Ranking(s, 10, 100 * i) for i in range(8)]
        tei = s.post({"query": "q", "texts": documents(12, 5000)}, "/rerank")
        answers = [w.wait() for w in waiting]
        codes = {(a.status, a.json["error"]["code"]) for a in answers if a.status != 200}
        want = {(429, "queue_full"), (429, "too_slow"), (503, "deadline_exceeded"),
                (413, "too_slow")}  # where one alone takes longer than a second
        assert codes and codes <= want
        refused = [a for a in answers if a.status not in (200, 413)]  # 413: not to be sent again
        assert all(int(a.headers["Retry-After"]) >= 1 for a in refused)
        assert tei.status in (200, 413) or tei.json["error_type"] in ("Overloaded", "Unhealthy")


def test_memory_of_returned_documents():
    """A text that is returned is counted until its answer is sent."""
    big = "x" * 30000
    with with_reranker(*BUSY, "--max-memory", 1) as s:
        slow = Ranking(s, 40, return_documents=True)
        s.wait_metric("qemb_reranker_queue_tokens", lambda x: x > 0)
        more = {"query": "q", "documents": [big] * 8, "max_tokens_per_doc": 5}
        a = s.post({**more, "return_documents": True}, "/v1/rerank")
        assert (a.status, a.json["error"]["code"]) == (429, "server_overloaded")
        assert s.post(more, "/v1/rerank").status == 200
        a = slow.wait()
        got = {r["index"]: r["document"]["text"] for r in a.json["results"]}
        assert [got[i] for i in range(40)] == slow.body["documents"]
        more = {**more, "return_documents": True}  # it is released after its answer is sent
        wait_for(lambda: s.post(more, "/v1/rerank").status == 200, GUARD)


def test_departed_clients_are_dropped():
    with server(*BUSY, model=RERANKER) as s:
        slow = Ranking(s, 30, return_documents=True)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        slow.c.close()
        s.wait_metric("qemb_departed_total", lambda x: x == 1)
        assert s.post(ASK, "/v1/rerank").status == 200


# ---- caches, broken models -----------------------------------------------------------------------


def changed(tmp_path, name, change):
    """The reranker with other bytes of a section."""
    f = edit_qemb.Qemb(RERANKER)
    f.sections[name][4] = change(f.sections[name][4])
    return f.write(tmp_path / "changed.qemb")


def test_scores_are_cached(both):
    new = documents(5, 700, 3)
    body = {"query": QUERY, "documents": new}
    before = both.metrics()
    want = results_in(both.post(body, "/v1/rerank"))
    assert results_in(both.post({**body, "top_n": 2, "documents": new[::-1]}, "/v2/rerank"))
    raw = both.post({"query": QUERY, "texts": new, "raw_scores": True}, "/rerank").json
    assert [r["index"] for r in raw] == [r["index"] for r in want]
    grown = {k[0]: v - before[k] for k, v in both.metrics().items() if not k[1] and k in before}
    assert grown["qemb_computed_texts_total"] == 5 and grown["qemb_cache_hits_total"] == 10
    other = results_in(both.post({**body, "query": "another"}, "/v1/rerank"))
    assert sorted(r["relevance_score"] for r in other) != sorted(r["relevance_score"] for r in want)


def test_null_is_not_given(both):
    """Clients that send every optional key send null for those that they do not use."""
    body = {"query": QUERY, "documents": ["two"], "texts": None}
    want = results_in(both.post({"query": QUERY, "documents": ["two"]}, "/rerank"))
    assert results_in(both.post(body, "/rerank")) == want
    tei = both.post({"query": QUERY, "texts": ["two"], "documents": None}, "/rerank").json
    assert [r["index"] for r in tei] == [0]
    answer = both.post({"query": QUERY, "documents": None, "texts": None}, "/rerank")
    assert answer.status == 400 and answer.json["error"]["param"] == "documents"


def test_a_query_that_leaves_no_room(both):
    answer = both.post({"query": "x " * 4000, "documents": ["a", "b"]}, "/v1/rerank")
    assert answer.status == 400 and answer.json["error"]["param"] == "query"
    assert answer.json["error"]["code"] == "context_length_exceeded"
    assert answer.json["error"]["message"].startswith("query: too long for any document")


def test_redis_keeps_scores(redis):
    args = ("--cache", 0, *with_redis(redis.port))
    want = ranked(QUERY, TEXTS)["results"]
    body = {"query": QUERY, "documents": TEXTS}
    with with_reranker(*args) as s:
        assert results_in(s.post(body, "/v1/rerank")) == want
        wait_stored(redis, 2 + len(set(TEXTS)))  # and the probes
    with with_reranker(*args) as s:
        assert results_in(s.post(body, "/v1/rerank")) == want
        assert s.metric("qemb_redis_hits_total") >= len(TEXTS)
        lengths = {k: int(redis.command(b"STRLEN", k)[1:]) for k in redis.keys()}
        logits = [k for k, n in lengths.items() if n == 8]
        assert len(logits) == 1 + len(set(TEXTS))
        for floats in (struct.pack("<f", math.nan), struct.pack("<f", math.inf), b"\0" * 8):
            wrong = {k: redis_value(k, floats) for k in logits}
            for k, value in wrong.items():
                assert redis.command(b"SET", k, value) == b"+OK"
            assert results_in(s.post(body, "/v1/rerank")) == want
            now = lambda k: redis.command(b"GET", k, lines=2)[1]
            # scores are stored asynchronously; not the probe's
            wait_for(lambda: sum(now(k) == v for k, v in wrong.items()) <= 1, GUARD)
        for k in logits:  # zero is a score
            assert redis.command(b"SET", k, redis_value(k, b"\0" * 4)) == b"+OK"
        a = results_in(s.post(body, "/v1/rerank"))
        assert {r["relevance_score"] for r in a} == {"0.5"}
        assert [r["index"] for r in a] == list(range(len(TEXTS)))


def test_a_logit_of_zero(tmp_path):
    path = changed(tmp_path, "dense", lambda b: bytes(len(b)))
    with server(model=path) as s:
        a = results_in(s.post({"query": "q", "documents": TEXTS}, "/v1/rerank"))
        assert a == [{"index": i, "relevance_score": "0.5"} for i in range(len(TEXTS))]
        raw = exact(s.post({**TEI, "raw_scores": True}, "/rerank").body)
        assert raw == [{"index": 0, "score": "0.0"}]


def test_a_model_without_scores(tmp_path):
    path = changed(tmp_path, "dense", lambda b: struct.pack("<f", math.inf) * (len(b) // 4))
    with server("--reranker", path, "--reranker-name", "r", wait="failing") as s:
        s.wait_log("ready")
        a = s.post(ASK, "/v1/rerank")
        assert (a.status, a.error["code"]) == (422, "non_finite")
        assert a.error["message"].startswith("documents[0]:")
        a = s.post(TEI, "/rerank")
        assert (a.status, a.json["error_type"]) == (424, "Backend")
        assert len(s.embed(["x"])) == 1
        a = s.request("GET", "/health")
        assert a.status == 503 and a.json == {"status": "failing", "reranker": "failing"}
        s.wait_metric("qemb_rerank_seconds_count", lambda x: x == 2)
        requests = {k: v for k, v in s.metrics().items() if k[0] == "qemb_requests_total"}
        assert requests[("qemb_requests_total", (("code", "424"), ("path", "/rerank")))] == 1


# ---- load, the end -------------------------------------------------------------------------------


ROUNDS = 1 if SANITIZED else 3


def test_mixed_load():
    """Requests to rerank and to embed, each with its own answer, whatever shares its batches."""
    sets = [(f"query {i}", documents(1 + i % 7, 10 * i, 1 + i % 9)) for i in range(24)]
    want = [r["results"] for r in qemb_rerank([{"query": q, "documents": d} for q, d in sets])]
    texts = [f"text {i}" for i in range(48)]
    vectors = vectors_of(texts, MODEL)
    with with_reranker("--cache", 0) as s:

        def ask(i):
            if i % 3:
                k = i * 7 % 48
                return s.embed([texts[k]]) == [vectors[k]]
            k = i // 3 % 24
            body = {"query": sets[k][0], "documents": sets[k][1]}
            return results_in(s.post(body, PATHS[i % 3])) == want[k]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(ROUNDS * 72)))
        assert s.metric("qemb_documents_total") == ROUNDS * sum(len(d) for _, d in sets)
        assert s.metric("qemb_texts_total") == ROUNDS * 48


@pytest.mark.parametrize("args", [(), ("--batch-tokens", 200), ("--batch-tokens", 1)])
def test_batches_change_no_score(args):
    with server(*args, model=RERANKER) as s:
        body = {"query": QUERY, "documents": TEXTS + documents(20)}
        assert results_in(s.post(body, "/v1/rerank")) == ranked(QUERY, body["documents"])["results"]


def test_drain_answers_rerank_requests():
    s = Server(*BUSY, "--reranker", RERANKER)
    s.wait_log("ready", 2)
    slow = [Ranking(s, 10, 100 * i, path, return_documents=True) for i, path in enumerate(PATHS)]
    s.wait_metric("qemb_reranker_queue_requests", lambda x: x == len(slow))
    s.process.send_signal(signal.SIGTERM)
    s.wait_log("draining")
    for w in slow:
        a = w.wait()
        assert a.status == 200 and len(a.json["results"]) == 10
        assert all(
            r["document"]["text"] == w.body["documents"][r["index"]] for r in a.json["results"]
        )
    s.stop()


def test_drain_is_bounded():
    s = Server(*BUSY, "--drain", 0, model=RERANKER)
    slow = [Ranking(s, 60, 100 * i) for i in range(2)]
    s.wait_metric("qemb_queue_requests", lambda x: x == 2)
    s.process.send_signal(signal.SIGTERM)
    for w in slow:
        a = w.wait()
        assert (a.status, a.json["error"]["code"]) == (503, "shutting_down")
    s.stop()


# ---- metrics, log --------------------------------------------------------------------------------


def test_metrics_and_log(tmp_path):
    with with_reranker() as s:
        tokens = s.post({"query": "Geheimnis", "documents": ["eins", "zwei"]}, "/v1/rerank").json
        s.post(TEI, "/rerank")
        s.post({"Geheimnis": 1}, "/v2/rerank")
        s.embed(["x"])
        s.wait_metric("qemb_rerank_seconds_count", lambda x: x == 3)
        m = s.metrics()
        assert m[("qemb_documents_total", ())] == 3 and m[("qemb_texts_total", ())] == 1
        used = m[("qemb_document_tokens_total", ())]
        assert used > tokens["usage"]["total_tokens"] > 2 * m[("qemb_tokens_total", ())]
        count = lambda path, code: m[("qemb_requests_total", (("code", code), ("path", path)))]
        assert (
            count("/v1/rerank", "200") == count("/rerank", "200") == count("/v2/rerank", "400") == 1
        )
        assert m[("qemb_request_seconds_count", ())] == 1
    assert {e["role"] for e in s.of["loaded"]} == {"main", "reranker"}
    line = [e for e in s.of["request"] if e["path"] == "/v1/rerank"][0]
    assert line["texts"] == 2 and line["tokens"] == tokens["usage"]["total_tokens"]
    assert b"Geheimnis" not in b"".join(s.raw)


def batches_of(s, prefix):
    m = s.metrics()
    assert m[(f"{prefix}_seconds_count", ())] == m[(f"{prefix}_tokens_count", ())]
    names = ("texts_count", "texts_sum", "tokens_sum")
    return [m[(f"{prefix}_{name}", ())] for name in names]


def test_metrics_of_batches_are_apart():
    """The first model's keep their names, whatever its kind."""
    with with_reranker("--cache", 0) as s:
        one, other = batches_of(s, "qemb_batch"), batches_of(s, "qemb_reranker_batch")
        tokens = s.post({"query": "q", "documents": ["a", "b"]}, "/v1/rerank").json["usage"]
        got = [x - y for x, y in zip(batches_of(s, "qemb_reranker_batch"), other)]
        assert got[0] in (1, 2) and got[1:] == [2, tokens["total_tokens"]]
        assert batches_of(s, "qemb_batch") == one
        s.embed(["a", "b"])
        assert batches_of(s, "qemb_batch")[1] == one[1] + 2
    with server(model=RERANKER) as s:
        s.post(ASK, "/v1/rerank")
        assert batches_of(s, "qemb_batch")[1] == 2 and batches_of(s, "qemb_reranker_batch")[0] == 0


# ---- clients -------------------------------------------------------------------------------------

PASSAGES = ["Venus is hot.", "Mars is the red planet.", "", "Jupiter has a red spot."]


def test_cohere_client(both):
    want = [(r["index"], float(r["relevance_score"])) for r in ranked(QUERY, PASSAGES)["results"]]
    where = {"base_url": f"http://127.0.0.1:{both.port}", "timeout": GUARD}
    v1, v2 = cohere.Client("none", **where), cohere.ClientV2("none", **where)
    a = v1.rerank(model="reranker", query=QUERY, documents=PASSAGES, return_documents=True, top_n=3)
    assert [(r.index, r.relevance_score) for r in a.results] == want[:3]
    assert all(r.document.text == PASSAGES[r.index] for r in a.results)
    assert a.meta.billed_units.search_units == 1 and a.meta.api_version.version == "1"
    a = v1.rerank(query=QUERY, documents=[{"text": p} for p in PASSAGES])  # no model
    assert [(r.index, r.relevance_score) for r in a.results] == want
    a = v2.rerank(model="reranker", query=QUERY, documents=PASSAGES, max_tokens_per_doc=4096)
    assert [(r.index, r.relevance_score) for r in a.results] == want
    assert a.id and a.meta.api_version.version == "2"
    with pytest.raises(cohere.NotFoundError) as e:
        v2.rerank(model="rerank-v3.5", query=QUERY, documents=PASSAGES)
    assert "rerank-v3.5" in e.value.body["message"]
    with pytest.raises(cohere.BadRequestError):
        v2.rerank(model="reranker", query=QUERY, documents=[])


def test_langchain_cohere_rerank(both):
    want = ranked(QUERY, PASSAGES)["results"][:2]
    reranker = CohereRerank(
        cohere_api_key="none", base_url=f"http://127.0.0.1:{both.port}", model="reranker", top_n=2
    )
    got = reranker.compress_documents([Document(page_content=p) for p in PASSAGES], QUERY)
    assert [(d.page_content, d.metadata["relevance_score"]) for d in got] == [
        (PASSAGES[r["index"]], float(r["relevance_score"])) for r in want
    ]


def http_post(s, path, body, headers):
    url = f"http://127.0.0.1:{s.port}{path}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=GUARD) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        return json.load(e)


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_jina_clients(both, path):
    """What LangChain's JinaRerank and LlamaIndex's JinaRerank send: they read results or detail."""
    headers = {
        "Authorization": "Bearer none",
        "Accept-Encoding": "identity",
        "Content-type": "application/json",
        "user-agent": "langchain/python",
    }
    body = {"query": QUERY, "documents": PASSAGES, "model": "reranker", "top_n": 3}
    got = http_post(both, path, body, headers)
    want = ranked(QUERY, PASSAGES)["results"]
    assert [r["index"] for r in got["results"]] == [r["index"] for r in want[:3]]
    got = http_post(both, path, {**body, "model": "jina-reranker-v2"}, headers)
    assert "results" not in got and "jina-reranker-v2" in got["detail"]


def test_curl(both):
    """The form of Jina's documentation."""
    if not shutil.which("curl"):
        pytest.skip("curl: not installed")
    body = {"model": "reranker", "query": QUERY, "top_n": 3, "documents": PASSAGES}
    out = subprocess.run(
        [
            "curl",
            "-sS",
            "-X",
            "POST",
            f"http://127.0.0.1:{both.port}/v1/rerank",
            "-H",
            "Content-Type: application/json",
            "-H",
            "Authorization: Bearer none",
            "-d",
            json.dumps({**body, "return_documents": True}),
        ],
        stdout=subprocess.PIPE,
        timeout=GUARD,
        check=True,
    ).stdout
    got = json.loads(out)
    assert got["model"] == "reranker" and got["usage"]["total_tokens"] > 0
    assert [r["document"]["text"] for r in got["results"]] == [
        PASSAGES[r["index"]] for r in ranked(QUERY, PASSAGES)["results"][:3]
    ]


def test_tei_clients(both):
    """What LlamaIndex's TextEmbeddingInference and LiteLLM's huggingface send."""
    want = ranked(QUERY, PASSAGES)["results"]
    bodies = [
        {"query": QUERY, "texts": PASSAGES},
        {
            "query": QUERY,
            "texts": PASSAGES,
            "return_text": True,
            "raw_scores": False,
            "truncation_direction": "Right",
        },
    ]
    for body in bodies:
        got = http_post(both, "/rerank", body, {"Content-Type": "application/json"})
        assert isinstance(got, list) and len(got) == len(PASSAGES)
        assert [(r["index"], r["score"]) for r in got] == [
            (r["index"], float(r["relevance_score"])) for r in want
        ]
        assert all(r.get("text", PASSAGES[r["index"]]) == PASSAGES[r["index"]] for r in got)
