"""qemb-serve, used through the openai client, curl and raw sockets."""

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
from serve_client import (  # noqa: F401 - serve is a fixture
    Answer,
    BUSY,
    BUSY_CPU,
    EOS,
    GUARD,
    HIDDEN,
    JSON,
    LONG,
    MAX_TOKENS,
    MODEL,
    OK,
    QEMB,
    ROOT,
    SANITIZED,
    SERVE,
    SHORT,
    Server,
    Slow,
    TEXTS,
    TINY,
    VOCAB,
    ask,
    is_closed,
    long_ids,
    qemb,
    serve,
    server,
    slow_request,
    vectors_in,
    vectors_of,
)

# ---- vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [HIDDEN, 64, 1])
def test_vectors_are_qembs_bit_for_bit(serve, dim):
    want = qemb("--output", "base64", "--dim", str(dim), records=[{"text": t} for t in TEXTS])
    got = serve.openai().embeddings.with_raw_response.create(
        model="small", input=TEXTS, dimensions=dim, encoding_format="base64"
    )
    body = json.loads(got.text)
    assert [e["embedding"] for e in body["data"]] == want
    assert [e["index"] for e in body["data"]] == list(range(len(TEXTS)))
    assert body["model"] == "small" and body["object"] == "list"


def test_openai_client_decodes_what_it_asked_for(serve):
    """By default the client asks for base64 and decodes it; with "float" it gets numbers."""
    client = serve.openai()
    want = [
        np.frombuffer(base64.b64decode(v), "<f4")
        for v in qemb("--output", "base64", records=[{"text": t} for t in TEXTS])
    ]
    for kw in ({}, {"encoding_format": "float"}):
        got = client.embeddings.create(model="small", input=TEXTS, user="someone", **kw)
        vectors = [np.array(e.embedding, np.float64).astype("<f4") for e in got.data]
        assert all(a.tobytes() == b.tobytes() for a, b in zip(vectors, want, strict=True))


def test_one_string_is_one_vector(serve):
    got = serve.openai().embeddings.create(model="small", input="two", encoding_format="float")
    assert len(got.data) == 1 and got.data[0].index == 0 and got.data[0].object == "embedding"


def test_token_ids(serve):
    lists = [[1, 2, 3, EOS], [VOCAB - 1, EOS], [65, EOS], [EOS]]
    want = qemb("--output", "base64", records=[{"ids": ids} for ids in lists])
    assert serve.embed(lists) == want
    assert serve.embed(lists[0]) == want[:1]


def test_foreign_token_ids(serve):
    """Ids that do not end in end-of-text, such as those of another tokenizer, are refused."""
    for ids in [1, 2, 3], [[1, EOS], [2]], [100257], [[EOS, 5]]:
        a = serve.post({"model": "small", "input": ids})
        assert (a.status, a.error["code"], a.error["param"]) == (400, "foreign_token_ids", "input")
        assert "check_embedding_ctx_length=False" in a.error["message"]
        assert "--allow-token-ids" in a.error["message"]
    lists = [[1, 2, 3], [1, 2, 3, EOS], [65]]
    want = qemb("--output", "base64", records=[{"ids": ids} for ids in lists])
    with server("--allow-token-ids") as s:
        assert s.embed(lists) == want and want[0] == want[1]
    path = str(ROOT / "tests" / "golden" / "pplx.qemb")  # a model without end-of-text
    with server("--name", "small", model=path) as s:
        assert s.post({"input": [[1, 2]]}).error["code"] == "foreign_token_ids"
        assert s.post({"input": ["x"]}).status == 200


def test_usage_counts_tokens(serve):
    tokens = [json.loads(l) for l in qemb("tokenize", records=[{"text": t} for t in TEXTS])]
    got = serve.openai().embeddings.create(model="small", input=TEXTS)
    assert got.usage.prompt_tokens == got.usage.total_tokens == sum(map(len, tokens))


def test_tokenize(serve):
    want = [json.loads(l) for l in qemb("tokenize", records=[{"text": t} for t in TEXTS])]
    a = serve.post({"input": TEXTS}, "/tokenize")
    assert a.status == 200 and [d["tokens"] for d in a.json["data"]] == want
    assert a.json["usage"]["total_tokens"] == sum(map(len, want))
    assert a.json["max_tokens"] == MAX_TOKENS
    assert serve.embed(want) == serve.embed(TEXTS)


def test_instruct(serve):
    records = [{"text": t, "instruct": "Find it"} for t in TEXTS]
    got = serve.openai().embeddings.create(
        model="small", input=TEXTS, encoding_format="float", extra_body={"instruct": "Find it"}
    )
    want = qemb("--output", "json", records=records)
    for e, line in zip(got.data, want, strict=True):
        assert np.array_equal(np.float32(e.embedding), np.float32(json.loads(line)))


def test_server_default_prompt():
    with server("--query") as s:
        assert s.embed(["two"]) == qemb("--query", "--output", "base64", records=[{"text": "two"}])
        assert s.embed(["two"], instruct="") == qemb(
            "--output", "base64", records=[{"text": "two"}]
        )
        assert s.embed(["two"], instruct="T") == qemb(
            "--output", "base64", records=[{"text": "two", "instruct": "T"}]
        )


def test_truncate(serve):
    text = "word " * MAX_TOKENS
    want = qemb("--truncate", "--output", "base64", records=[{"text": text}])
    assert serve.embed([text], truncate=True) == want
    line = qemb("--truncate", "--output", "jsonl", records=[{"text": text}])[0]
    said = json.loads(line)["truncated_bytes"]
    ids = [*range(200)] * 20 + [EOS]
    for path in ("/v1/embeddings", "/v1/embeddings", "/tokenize"):
        a = serve.post({"model": "small", "input": ["x", text], "truncate": True}, path)
        assert [e.get("truncated_bytes") for e in a.json["data"]] == [None, said]
        a = serve.post({"model": "small", "input": [[5, EOS], ids], "truncate": True}, path)
        cut = [e.get("truncated_tokens") for e in a.json["data"]]
        assert cut == [None, len(ids) - MAX_TOKENS]
    got = serve.openai().embeddings.create(model="small", input=text, extra_body={"truncate": True})
    assert len(got.data[0].embedding) == HIDDEN and got.data[0].truncated_bytes == said
    a = serve.post({"model": "small", "input": ["x", text]})
    assert a.status == 400 and a.error["code"] == "context_length_exceeded"
    assert a.error["message"].startswith("input[1]:")


@pytest.mark.parametrize("model", ["gqa2", "square", "massive"])
def test_other_models(model):
    path = str(ROOT / "tests" / "golden" / f"{model}.qemb")
    info = subprocess.run([QEMB, "info", path], stdout=subprocess.PIPE, check=True).stdout.decode()
    vocab = int(re.search(r"vocabulary +(\d+)", info)[1])
    lists = [[k % vocab for k in range(i, 3 * i)] for i in range(1, 12)]
    want = qemb("--output", "base64", records=[{"ids": ids} for ids in lists], model=path)
    with server("--name", "small", "--allow-token-ids", model=path) as s:
        assert s.embed(lists) == want


def test_many_clients_get_their_own_vectors(serve):
    texts = [f"text {i % 150} of many" for i in range(300)]
    want = qemb("--output", "base64", records=[{"text": t} for t in texts])
    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(lambda t: serve.embed([t])[0], texts))
    assert got == want


# ---- errors --------------------------------------------------------------------------------------

BAD = [
    (b"", 400, "invalid_json", None),
    (b"{", 400, "invalid_json", None),
    (b'{"model":"small","input":"x"', 400, "invalid_json", None),
    (b'{"model":"small","input":"\xff"}', 400, "invalid_json", None),
    (b'{"model":"small","input":"\\ud800"}', 400, "invalid_json", None),
    (b'{"model":"small","input":"x","input":"y"}', 400, "invalid_json", None),
    (b"[" * 100000, 400, "invalid_json", None),
    ([1], 400, "invalid_json", None),
    ({"model": "small"}, 400, "missing_parameter", "input"),
    ({**OK, "model": 3}, 400, "invalid_type", "model"),
    ({**OK, "model": "other"}, 404, "model_not_found", "model"),
    ({**OK, "input": None}, 400, "missing_parameter", "input"),
    ({**OK, "input": {}}, 400, "invalid_type", "input"),
    ({**OK, "input": []}, 400, "empty_input", "input"),
    ({**OK, "input": [[]]}, 400, "empty_input", "input"),
    ({**OK, "input": [True]}, 400, "invalid_type", "input"),
    ({**OK, "input": ["x", None]}, 400, "invalid_type", "input"),
    ({**OK, "input": ["x", 1]}, 400, "invalid_type", "input"),
    ({**OK, "input": [1, "x"]}, 400, "invalid_type", "input"),
    ({**OK, "input": [[1], 1]}, 400, "invalid_type", "input"),
    ({**OK, "input": [1.5]}, 400, "invalid_type", "input"),
    ({**OK, "input": [[1], [1.5]]}, 400, "invalid_type", "input"),
    ({**OK, "input": [-1]}, 400, "invalid_token", "input"),
    ({**OK, "input": [[1, EOS], [VOCAB, EOS]]}, 400, "invalid_token", "input"),
    ({**OK, "input": [2**31]}, 400, "invalid_token", "input"),
    ({**OK, "input": [1] * MAX_TOKENS + [EOS]}, 400, "context_length_exceeded", "input"),
    ({**OK, "input": ["x"] * 2049}, 400, "too_many_inputs", "input"),
    ({**OK, "dimensions": 0}, 400, "invalid_dimensions", "dimensions"),
    ({**OK, "dimensions": HIDDEN + 1}, 400, "invalid_dimensions", "dimensions"),
    ({**OK, "dimensions": 2**63 - 1}, 400, "invalid_dimensions", "dimensions"),
    ({**OK, "dimensions": "8"}, 400, "invalid_type", "dimensions"),
    ({**OK, "encoding_format": "hex"}, 400, "invalid_encoding_format", "encoding_format"),
    ({**OK, "encoding_format": 1}, 400, "invalid_type", "encoding_format"),
    ({**OK, "truncate": "yes"}, 400, "invalid_truncation", "truncate"),
    ({**OK, "fallback": 1}, 400, "invalid_type", "fallback"),
    ({**OK, "instruct": 1}, 400, "invalid_type", "instruct"),
    ({**OK, "input": [1], "instruct": "x"}, 400, "invalid_instruct", "instruct"),
    ({**OK, "dimension": 4}, 400, "unknown_parameter", "dimension"),
]


@pytest.mark.parametrize("body,status,code,param", BAD)
def test_bad_requests(serve, body, status, code, param):
    a = serve.post(body)
    assert (a.status, a.error["code"], a.error["param"]) == (status, code, param)
    assert a.error["type"] == "invalid_request_error" and a.error["message"]
    assert a.headers["Content-Type"] == "application/json"


def test_null_counts_as_not_given(serve):
    more = {
        "dimensions": None,
        "encoding_format": None,
        "user": None,
        "instruct": None,
        "truncate": None,
        "fallback": None,
    }
    assert serve.post({**OK, **more}).status == 200


def test_openai_client_sees_its_own_errors(serve):
    client = serve.openai()
    with pytest.raises(openai.NotFoundError) as e:
        client.embeddings.create(model="other", input="x")
    assert e.value.code == "model_not_found" and e.value.param == "model"
    with pytest.raises(openai.BadRequestError) as e:
        client.embeddings.create(model="small", input="x", dimensions=HIDDEN + 1)
    assert e.value.param == "dimensions" and e.value.request_id


def test_paths_and_methods(serve):
    assert serve.request("GET", "/").error["code"] == "unknown_url"
    assert serve.request("GET", "/v1/embedding").status == 404
    for method, path, allow in [
        ("GET", "/v1/embeddings", "POST"),
        ("PUT", "/v1/embeddings", "POST"),
        ("GET", "/tokenize", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
    ]:
        a = serve.request(method, path, "{}" if method != "GET" else None)
        assert (a.status, a.headers["Allow"]) == (405, allow)
        assert a.error["code"] == "method_not_allowed"
    a = serve.request("HEAD", "/health")
    assert a.status == 200 and a.body == b""


@pytest.mark.parametrize(
    "headers,status",
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/jsonp"}, 415),
        ({"Content-Type": "application/json; charset=latin-1"}, 415),
        ({**JSON, "Content-Encoding": "br"}, 415),
        ({"Content-Type": 'Application/JSON ; charset="UTF-8"'}, 200),
        ({}, 200),
    ],
)
def test_content_types(serve, headers, status):
    a = serve.post(OK, headers=headers)
    assert a.status == status
    if status == 415:
        assert a.error["code"] == "unsupported_media_type"


def test_request_ids(serve):
    assert (
        serve.post(OK, headers={**JSON, "X-Request-Id": "me-1.2_3"}).headers["x-request-id"]
        == "me-1.2_3"
    )
    ids = {serve.post(OK).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5
    for bad in ['"', "a b", "x" * 65]:
        assert serve.post(OK, headers={**JSON, "X-Request-Id": bad}).headers["x-request-id"] != bad


def test_api_keys(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# two keys\nfirst-key\n\nsecond-key\r\n")
    with server("--api-key-file", keys) as s:
        for key in ("first-key", "second-key"):
            assert s.openai(api_key=key).embeddings.create(model="small", input="x").data
        with pytest.raises(openai.AuthenticationError) as e:
            s.openai(api_key="third-key").embeddings.create(model="small", input="x")
        assert e.value.code == "invalid_api_key"
        for headers in (
            {},
            {"Authorization": "first-key"},
            {"Authorization": "Bearer "},
            {"Authorization": "Bearer first-ke"},
            {"Authorization": "Bearer first-key2"},
            {"Authorization": "Bearer # two keys"},
        ):
            for method, path in (
                ("POST", "/v1/embeddings"),
                ("POST", "/tokenize"),
                ("GET", "/v1/models"),
            ):
                a = s.request(method, path, json.dumps(OK), {**JSON, **headers})
                assert a.status == 401 and a.headers["WWW-Authenticate"] == "Bearer"
        assert s.request("GET", "/health").status == s.request("GET", "/metrics").status == 200


# ---- models, health, metrics, log ----------------------------------------------------------------


def test_models():
    with server("--name", "one", "--name", "two") as s:
        client = s.openai()
        assert [m.id for m in client.models.list()] == ["one", "two"]
        assert client.embeddings.create(model="two", input="x").model == "one"
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="small", input="x")


def test_curl(serve, tmp_path):
    """curl's default POST, and a body so large that curl sends Expect: 100-continue."""
    if not shutil.which("curl"):
        pytest.skip("curl: not installed")
    url = f"http://127.0.0.1:{serve.port}/v1/embeddings"
    want = qemb("--output", "base64", records=[{"text": "x"}])
    for option in "--json", "-d":  # -d says that the body is a form
        out = subprocess.run(
            ["curl", "-sS", option, json.dumps({**OK, "encoding_format": "base64"}), url],
            stdout=subprocess.PIPE,
            timeout=GUARD,
            check=True,
        ).stdout
        assert [e["embedding"] for e in json.loads(out)["data"]] == want
    body = tmp_path / "body"
    body.write_text(json.dumps(OK) + " " * (2 << 20))
    out = subprocess.run(
        ["curl", "-sS", "-w", "%{http_code}", "-o", "/dev/null", "--json", f"@{body}", url],
        stdout=subprocess.PIPE,
        timeout=GUARD,
        check=True,
    ).stdout
    assert out == b"200"


def test_the_table_is_named():
    for args in (), ("--math", "bf16"), ("--cpu", "plain", "--math", "int8"):
        info = subprocess.run([QEMB, "info", MODEL, *args], stdout=subprocess.PIPE, check=True)
        table = re.search(r"^table +(.*), on this machine$", info.stdout.decode(), re.M)[1]
        with server(*args) as s:
            assert s.wait_log("loaded")["table"] == table
            told = [dict(k[1])["table"] for k in s.metrics() if k[0] == "qemb_model_info"]
            assert told == [table]


def test_metrics():
    with server() as s:
        before = s.metrics()
        s.embed(["metrics one", "metrics two", "metrics one"])
        s.post(b"{")
        # a request is counted after its answer is sent; the client may have read that already
        s.wait_metric("qemb_request_seconds_count", lambda x: x == 2)
        after = s.metrics()

    def grown(name, **labels):
        key = (name, tuple(sorted(labels.items())))
        return after.get(key, 0) - before.get(key, 0)

    assert grown("qemb_texts_total") == 3 and grown("qemb_computed_texts_total") == 2
    assert grown("qemb_dedup_hits_total") == 1
    assert grown("qemb_requests_total", path="/v1/embeddings", code="200") == 1
    assert grown("qemb_requests_total", path="/v1/embeddings", code="400") == 1
    assert grown("qemb_request_seconds_count") == 2 and grown("qemb_batch_texts_sum") == 2
    assert grown("qemb_batch_tokens_sum") == grown("qemb_computed_tokens_total") > 0
    assert grown("qemb_tokens_total") > grown("qemb_computed_tokens_total")
    assert after[("qemb_healthy", ())] == 1 and after[("qemb_queue_tokens", ())] == 0
    assert grown("qemb_batch_seconds_bucket", le="+Inf") == grown("qemb_batch_seconds_count")


def test_log_has_no_text():
    secret, name = "Geheimnis", "X-Geheimnis"
    with server() as s:
        s.embed([secret])
        s.post({"model": secret, "input": secret})
        s.post({secret: 1})
        s.post(f'{{"input": {secret}}}')
        s.post({"model": "small", "input": secret * 4000})
        s.request("GET", f"/{secret}?{secret}", None, {name: secret})
        c = s.connect()
        c.sock = socket.create_connection(("127.0.0.1", s.port), GUARD)
        c.sock.sendall(secret.encode() + b"\r\n\r\n")
        c.sock.recv(1000)
        c.close()
        s.wait_log("request", 7)
    log = b"".join(s.raw)
    assert secret.encode() not in log
    lines = sorted(s.of["request"], key=lambda e: e["status"])
    assert [e["status"] for e in lines] == [200, 400, 400, 400, 400, 404, 404]
    assert lines[0]["tokens"] > 0 and lines[0]["texts"] == 1 and lines[0]["ms"] > 0
    assert all(e["request_id"] and e["time"].endswith("Z") for e in lines)


def sections(path):
    """name -> (dtype, rows, cols, offset, bytes) of a .qemb file."""
    data = Path(path).read_bytes()
    out = {}
    for i in range(struct.unpack_from("<I", data, 32)[0]):
        at = 4096 + 96 * i
        name = data[at : at + 48].rstrip(b"\0").decode()
        dtype, _, rows, cols, offset, size = struct.unpack_from("<IIQQQQ", data, at + 48)
        out[name] = (dtype, rows, cols, offset, size)
    return out


def broken_model(tmp_path, token):
    """The small model with an infinite number in the embedding of a token."""
    path = tmp_path / "broken.qemb"
    data = bytearray(Path(MODEL).read_bytes())
    _, _, cols, offset, _ = sections(MODEL)["tok_emb"]
    struct.pack_into("<H", data, offset + 2 * cols * token, 0x7C00)
    path.write_bytes(data)
    return str(path)


def test_a_text_without_a_vector(tmp_path):
    """The answer is an error that names the text, not a zero or null vector; health recovers."""
    with server("--name", "small", model=broken_model(tmp_path, 65)) as s:
        a = s.post({"model": "small", "input": [[66, EOS], [65, EOS], [67, EOS]]})
        assert a.status == 422 and a.error["code"] == "non_finite"
        assert a.error["message"].startswith("input[1]:")
        s.wait_log("failing")
        s.wait_log("ready", 2)  # the server probes the model itself
        assert s.request("GET", "/health").status == 200
        assert len(s.embed([[66, EOS], [67, EOS]])) == 2


def test_a_model_that_computes_nothing(tmp_path):
    with server("--name", "small", model=broken_model(tmp_path, EOS), wait="failing") as s:
        a = s.request("GET", "/health")
        assert a.status == 503 and a.json == {"status": "failing"}
        assert s.post(OK).status == 422
        assert s.metric("qemb_healthy") == 0


def test_a_client_may_send_what_the_probe_sends(tmp_path):
    """An empty text and a probe in the same batch share one text."""
    with server(*BUSY, "--name", "small", model=broken_model(tmp_path, EOS), wait="failing") as s:
        slow = Slow(s)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        for _ in range(3):
            a = s.post({"model": "small", "input": ["", "other"]})
            assert a.status == 422 and a.error["message"].startswith("input[0]:")
        assert slow.wait().status == 422


# ---- the fallback --------------------------------------------------------------------------------


def test_fallback_when_the_queue_is_full():
    n = 20
    text = lambda i: f"{i:03}" + "0123456789" * 3  # a digit is a token in both models
    with server(*BUSY, "--max-queue", n * LONG, "--fallback", TINY) as s:
        count = lambda texts: s.post({"input": texts}, "/tokenize").json["usage"]["total_tokens"]
        texts = [text(i) for i in range(n * LONG // count([text(0)]))]
        assert (n - 1) * LONG < count(texts) <= n * LONG  # no room while a long text waits
        want = vectors_of(texts, TINY, *BUSY_CPU)
        want7 = vectors_of(texts, TINY, "--dim", "7", *BUSY_CPU)
        s.wait_log("ready", 2)
        assert s.post(ask(["x"], fallback=True)).json["model"] == "small"  # the first model answers
        slow = Slow(s, n)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        a = s.post(ask(texts))
        assert a.status == 429 and a.error["code"] == "queue_full"
        assert s.post(ask(texts, fallback=False)).status == 429
        a = s.post(ask(texts, fallback=True))
        assert vectors_in(a) == want and a.json["model"] == "hf-tiny"
        a = s.post(ask(texts, fallback=True, dimensions=7))  # from the cache, cut
        assert vectors_in(a) == want7 and a.json["model"] == "hf-tiny"
        extra = {"fallback": True}
        got = s.openai().embeddings.create(model="small", input=texts, extra_body=extra)
        assert got.model == "hf-tiny" and len(got.data[0].embedding) == 32
        # more than the fallback can queue: the first answer is returned
        assert s.post(ask(texts, fallback=True, dimensions=33)).status == 429
        assert s.post(ask([*texts[:-7], "1" * 205], fallback=True)).status == 429
        assert s.metric("qemb_queue_tokens") > 0, "the queue was to be full all the time"
        assert s.metric("qemb_fallbacks_total") == 3
        assert slow.wait().status == 200
        assert s.post(ask(["y"], fallback=True)).json["model"] == "small"
    assert [e["fallback"] for e in s.of["request"]].count(True) == 3


def test_fallback_when_the_model_fails(tmp_path):
    broken = broken_model(tmp_path, EOS)
    with server(
        "--name",
        "small",
        "--fallback",
        TINY,
        "--fallback-name",
        "tiny",
        model=broken,
        wait="failing",
    ) as s:
        s.wait_log("ready")
        a = s.post(ask(SHORT, fallback=True))
        assert vectors_in(a) == vectors_of(SHORT, TINY) and a.json["model"] == "tiny"
        words = [
            json.loads(l)
            for l in qemb("tokenize", records=[{"text": t} for t in SHORT], model=TINY)
        ]
        assert a.json["usage"]["total_tokens"] == sum(map(len, words))
        a = s.post(ask(SHORT, fallback=True, instruct="T"))
        want = [{"text": t, "instruct": "T"} for t in SHORT]
        assert vectors_in(a) == qemb("--output", "base64", records=want, model=TINY)
        assert s.post(ask(SHORT)).status == s.post(ask([[1, EOS]], fallback=True)).status == 422
        a = s.request("GET", "/health")
        assert a.status == 503 and a.json == {"status": "failing", "fallback": "ok"}
        assert s.metric("qemb_fallbacks_total") == 2 and s.metric("qemb_healthy") == 0


def test_a_fallback_that_fails_is_no_help(tmp_path):
    broken = broken_model(tmp_path, EOS)
    with server("--name", "small", "--fallback", broken, model=broken, wait=None) as s:
        s.wait_log("failing", 2)
        a = s.post(ask(["x"], fallback=True))
        assert a.status == 422 and s.metric("qemb_fallbacks_total") == 0


# ---- the queue -----------------------------------------------------------------------------------


def test_equal_texts_in_flight_are_computed_once():
    with server(*BUSY) as s:
        slow = Slow(s)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        many = [s.connect() for _ in range(20)]
        for i, c in enumerate(many):
            c.request(
                "POST", "/v1/embeddings", json.dumps(ask(["the same", f"other {i % 2}"])), JSON
            )
        vectors = [vectors_in(Answer(c.getresponse())) for c in many]
        for c in many:
            c.close()
        assert slow.wait().status == 200
        assert len({v[0] for v in vectors}) == 1 and len({v[1] for v in vectors}) == 2
        m = s.metrics()
        # One round or more: the first text may be taken before the last arrives, and the cache then
        # answers the last.
        computed = m[("qemb_computed_texts_total", ())] - 1 - 10
        shared, cached = m[("qemb_dedup_hits_total", ())], m[("qemb_cache_hits_total", ())]
        assert computed + shared + cached == 40 and shared > 0 and 3 <= computed < 20


def test_short_texts_do_not_wait_for_all_long_ones():
    with server(*BUSY) as s:
        slow = Slow(s)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        s.embed(["short"])
        assert s.metric("qemb_queue_tokens") > 0  # the long ones still wait
        assert slow.wait().status == 200


def test_departed_clients_are_dropped():
    with server(*BUSY) as s:
        slow = Slow(s)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        slow.leave()
        s.wait_metric("qemb_departed_total", lambda x: x == 1)
        assert s.metric("qemb_queue_tokens") == 0
        s.embed(["still there"])
        assert s.metric("qemb_computed_texts_total") < 10
    log = [e for e in s.of["request"] if e["texts"] == 10]
    assert log[0]["status"] == 499


def test_full_queue():
    with server(*BUSY, "--max-queue", 20 * LONG // 3) as s:
        client = s.openai()
        slow = [Slow(s, 6, 10 * i) for i in range(6)]  # nine tenths of the queue each
        with pytest.raises(openai.RateLimitError) as e:
            for i in range(6):
                client.embeddings.create(
                    model="small", input=[long_ids(500 + 10 * i + k) for k in range(6)]
                )
        assert e.value.code == "queue_full"
        assert int(e.value.response.headers["retry-after"]) >= 1
        answers = [x.wait() for x in slow]
        assert {a.status for a in answers} == {200, 429}
        a = s.post(slow_request(8))
        assert a.status == 413 and a.error["code"] == "too_many_tokens"


# ---- attacks -------------------------------------------------------------------------------------


def raw(s, data=b""):
    k = socket.create_connection(("127.0.0.1", s.port), GUARD)
    k.sendall(data)
    return k


def drained(k):
    """Everything that the server sends until it closes the connection."""
    got = b""
    with k, contextlib.suppress(ConnectionResetError):
        while chunk := k.recv(65536):
            got += chunk
    return got


def head(length, path="/v1/embeddings", more=""):
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def test_broken_bodies():
    body = json.dumps(OK).encode()
    broken = (
        b"",
        b"POST",
        b"\r\n\r\n",
        b"\0" * 5000,
        b"GET / HTTP/1.1\r\n" + b"x" * 100000,
        b"POST /v1/embeddings HTTP/9.9\r\n\r\n",
        head(len(body) + 5) + body,
        head("-1") + body,
        head("99999999999999999999") + body,
        head(0, more="Transfer-Encoding: chunked\r\n") + b"zz\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"ffffffffffffffffff\r\n",
    )
    with server("--receive-timeout", 1) as s:
        for data in broken:
            with contextlib.suppress(OSError):  # closed already
                k = raw(s, data)
                k.shutdown(socket.SHUT_WR)
                assert b" 200 " not in drained(k)
        assert len(s.embed(["still there"])) == 1


def test_pipelined_requests(serve):
    body = json.dumps(OK).encode()
    k = raw(serve, 3 * (head(len(body)) + body) + head(1, more="Connection: close\r\n") + b"{")
    answers = drained(k)
    assert answers.count(b"HTTP/1.1 200") == 3 and answers.count(b"HTTP/1.1 400") == 1


def test_body_limit():
    with server("--max-body", 1) as s:
        body = json.dumps(OK).encode()
        for extra, status in ((1024 - len(body), 200), (1025 - len(body), 413), (4000, 413)):
            for chunked in (False, True):
                c = s.connect()
                data = body + b" " * extra
                c.request(
                    "POST",
                    "/v1/embeddings",
                    iter([data]) if chunked else data,
                    JSON,
                    encode_chunked=chunked,
                )
                a = Answer(c.getresponse())
                assert a.status == status, (extra, chunked)
                assert status == 200 or a.error["code"] == "body_too_large"
                # the refused body was read, so the connection can be used again
                c.request("GET", "/health")
                assert Answer(c.getresponse()).status == 200
                c.close()
        k = raw(s, head(1 << 30))  # answered at once
        assert drained(k).startswith(b"HTTP/1.1 413")
        k = raw(s, b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(10000):  # never ends by itself
                k.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
            pytest.fail("an endless body was read")
        k.close()


def test_memory_limit():
    with server(*BUSY, "--max-memory", 1, "--max-queue", 100000) as s:
        body = {"model": "small", "input": [long_ids(i) for i in range(10)] + [[1, EOS]] * 380}
        c = s.connect()
        c.request("POST", "/v1/embeddings", json.dumps(body), JSON)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        a = s.post(body)
        assert a.status == 429 and a.error["code"] == "server_overloaded"
        assert int(a.headers["Retry-After"]) >= 1
        assert Answer(c.getresponse()).status == 200
        c.close()


def test_slow_clients_are_closed():
    """A slow header, a slow body, an idle connection and a client that does not read."""
    with server("--receive-timeout", 1) as s:
        slow = [raw(s, b"POST /v1/emb") for _ in range(20)]
        slow += [raw(s, head(1000) + b"{") for _ in range(20)]
        slow += [raw(s) for _ in range(20)]
        lazy = raw(s)
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"model": "small", "input": ["x"] * 2000}).encode()
        lazy.sendall(head(len(body)) + body)
        left = set(slow)
        until = time.monotonic() + GUARD
        while left and time.monotonic() < until:
            for k in list(left):
                try:
                    k.send(b"x")
                    closed = is_closed(k)
                except ConnectionError:
                    closed = True
                if closed:
                    left.discard(k)
            s.embed(["meanwhile"])
            time.sleep(0.1)
        assert not left
        s.wait_metric("qemb_reaped_total", lambda x: x >= 41)
        s.wait_metric("qemb_connections", lambda x: x == 1)
        for k in [*slow, lazy]:
            k.close()


def test_more_connections_than_allowed():
    with server("--max-connections", 8, "--receive-timeout", 1) as s:
        body = json.dumps(OK).encode()
        many = [raw(s, head(len(body), more="Connection: close\r\n") + body) for _ in range(40)]
        assert all(drained(k).startswith(b"HTTP/1.1 200") for k in many)


def test_a_thousand_connections():
    with server("--max-connections", 1100) as s:
        body = [
            json.dumps({**OK, "input": f"text {i}", "dimensions": 4}).encode() for i in range(1000)
        ]
        many = [raw(s) for _ in body]
        s.wait_metric("qemb_connections", lambda x: x > 1000)
        for k, b in zip(many, body):
            k.sendall(head(len(b), more="Connection: close\r\n") + b)
        answers = [drained(k) for k in many]
        assert all(a.startswith(b"HTTP/1.1 200") for a in answers)
        assert len({a.split(b"\r\n\r\n")[1] for a in answers}) == 1000


def test_a_log_that_nobody_reads_costs_lines_only():
    r, w = os.pipe()
    p = subprocess.Popen([SERVE, "-m", MODEL, "--port", "0", "--threads", "1"], stderr=w)
    os.close(w)
    log = os.fdopen(r, "rb", 0)
    port = json.loads(log.readline())["port"]
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=GUARD)
    for _ in range(1000):
        c.request("GET", "/health")
        Answer(c.getresponse())
    c.request("GET", "/metrics")
    lost = re.search(rb"qemb_log_lines_lost_total (\d+)", Answer(c.getresponse()).body)[1]
    assert int(lost) > 0
    c.close()
    p.send_signal(signal.SIGTERM)
    assert p.wait(GUARD) == 0
    log.close()


# ---- load ----------------------------------------------------------------------------------------

CHINESE = "今天天气很好，我们去公园散步吧。"


def tool(name):
    found = shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))
    if not found:
        pytest.skip(f"{name}: not installed")
    return found


def run_tool(*args, **kw):
    done = subprocess.run(
        args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=GUARD, **kw
    )
    out = done.stdout.decode()
    assert done.returncode == 0, out
    return out


def test_wrk(serve, tmp_path):
    script = tmp_path / "ask.lua"
    script.write_text(f'''wrk.method, wrk.body = "POST", [[{json.dumps({**OK, "input": CHINESE})}]]
        wrk.headers["Content-Type"] = "application/json"''')
    url = f"http://127.0.0.1:{serve.port}/v1/embeddings"
    out = run_tool(
        tool("wrk"), "-t", "2", "-c", "64", "-d", "1s", "--timeout", "60s", "-s", script, url
    )
    assert int(re.search(r"(\d+) requests in", out)[1]) > 0
    assert "Non-2xx" not in out and "Socket errors" not in out, out


@pytest.mark.parametrize("keep", [["-k"], []])
def test_ab(serve, tmp_path, keep):
    body = tmp_path / "body"
    body.write_text(json.dumps({**OK, "input": CHINESE}))
    url = f"http://127.0.0.1:{serve.port}/v1/embeddings"
    out = run_tool(
        tool("ab"), "-q", *keep, "-n", "600", "-c", "30", "-p", body, "-T", "application/json", url
    )
    assert re.search(r"Complete requests: +600", out) and re.search(
        r"Failed requests: +0", out
    ), out
    assert "Non-2xx" not in out, out


def test_locust(serve):
    url = f"http://127.0.0.1:{serve.port}"
    args = [
        "-f",
        str(ROOT / "tests" / "e2e" / "locustfile.py"),
        "--host",
        url,
        "--headless",
        "--only-summary",
    ]
    run_tool(tool("locust"), *args, "-u", "20", "-r", "20", "-t", "2s", "--exit-code-on-error", "1")


# ---- the end -------------------------------------------------------------------------------------


def test_term_under_load():
    """Every request on an accepted connection gets a complete answer."""
    s = Server(*BUSY)
    bad, good, stop = [], [], threading.Event()

    def client(i):
        for n in range(100000):
            if stop.is_set():
                return
            try:
                k = s.connect()
                k.connect()
            except ConnectionError:
                return  # it no longer listens
            try:
                text = f"load {i} {n}" * (1 + n % 30)
                k.request("POST", "/v1/embeddings", json.dumps({**OK, "input": text}), JSON)
                a = Answer(k.getresponse())
                (good if a.status == 200 and len(a.json["data"]) == 1 else bad).append(a.body)
            except Exception as e:
                bad.append(repr(e))
            finally:
                k.close()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(12)]
    for t in threads:
        t.start()
    until = time.monotonic() + GUARD
    while len(good) < 100 and time.monotonic() < until:
        time.sleep(0.02)
    s.stop()
    stop.set()
    for t in threads:
        t.join(GUARD)
    assert not bad and len(good) >= 100


def test_drain_answers_connections_that_nobody_has_accepted_yet():
    s = Server(*BUSY, "--max-connections", 2)
    slow = [Slow(s, 10, 10 * i) for i in range(2)]
    body = json.dumps(OK).encode()
    many = [raw(s, head(len(body)) + body) for _ in range(30)]
    s.process.send_signal(signal.SIGTERM)
    assert [x.wait().status for x in slow] == [200, 200]
    assert all(drained(k).startswith(b"HTTP/1.1 200") for k in many)
    s.stop()


def test_drain_answers_and_says_so():
    s = Server(*BUSY)
    kept = s.connect()
    kept.request("GET", "/health")
    assert Answer(kept.getresponse()).status == 200
    slow = Slow(s)
    s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
    s.process.send_signal(signal.SIGTERM)
    s.wait_log("draining")
    kept.request("GET", "/health")
    a = Answer(kept.getresponse())
    assert (
        a.status == 503 and a.json == {"status": "draining"} and a.headers["Connection"] == "close"
    )
    assert slow.wait().status == 200
    s.stop()


def test_drain_is_bounded():
    s = Server(*BUSY, "--drain", 0)
    slow = [Slow(s, 100, 100 * i) for i in range(2)]
    s.wait_metric("qemb_queue_requests", lambda x: x == 2)
    s.process.send_signal(signal.SIGTERM)
    for x in slow:
        a = x.wait()
        assert a.status == 503 and a.error["code"] == "shutting_down"
    s.stop()


@pytest.mark.skipif(SANITIZED, reason="sanitizers keep memory; they look for leaks themselves")
def test_memory_stays_flat():
    def rss():
        return int(
            re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{s.process.pid}/status").read_text())[1]
        )

    def some(n):
        c = s.connect()
        for i in range(n):
            c.request(
                "POST", "/v1/embeddings", json.dumps({**OK, "input": f"a text {i % 500}"}), JSON
            )
            assert Answer(c.getresponse()).status == 200
        c.close()

    with server() as s:
        some(1000)
        before = rss()
        some(2000)
        assert rss() - before < 1000  # KiB: half a KiB per request would show


# ---- usage ---------------------------------------------------------------------------------------


def test_manual_and_deployment_name_what_there_is(serve):
    text = subprocess.run([SERVE, "--help"], stdout=subprocess.PIPE, timeout=GUARD).stdout.decode()
    options = set(re.findall(r"--[a-z][a-z-]+", text))
    manual = re.sub(r"\\f.|\\(?=-)", "", (ROOT / "docs/man/qemb-serve.1").read_text())
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", manual)) | {"--help", "--version"} == options
    metrics = serve.request("GET", "/metrics").body.decode()
    packaging = ROOT / "packaging"
    for path in [packaging / "kubernetes.yaml", packaging / "qemb-serve.service",
                 *(packaging / "image").iterdir()]:
        deploy = path.read_text()
        own = re.sub(r"(apt-get|useradd|docker|make|--from|HEALTHCHECK).*|--no-install-recommends",
                     "", deploy)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", own)) <= options, path
        assert all(f"\n{name} " in metrics for name in re.findall(r"\bqemb_\w+", deploy)), path


@pytest.mark.parametrize(
    "args,status,message",
    [
        ((), 1, "no model"),
        ((MODEL,), 1, "an operand that means nothing (a model is given by -m)"),
        (("-m", "/nowhere"), 2, "/nowhere: No such file or directory (make convert "),
        (("-m", ROOT / "tests/golden/hf-tiny"), 2, "a Hugging Face directory (want a .qemb file: "),
        (("-m", MODEL, "--reranker", "Qwen/X"), 2, "make convert MODEL=Qwen/X OUT=model.qemb"),
        (("-m", MODEL, "--port", "65536"), 1, "--port"),
        (("-m", MODEL, "--host", "no.such.host.invalid"), 1, "--host"),
        (("-m", MODEL, "--host", "192.0.2.1"), 1, "cannot listen"),
        (("-m", MODEL, "--max-tokens", "4096"), 1, "--max-tokens"),
        (("-m", MODEL, "--api-key-file", "/nowhere"), 1, "/nowhere"),
        (("-m", MODEL, "--api-key-file", "/dev/null"), 1, "no key"),
        (("-m", MODEL, "--query", "--instruct", "x"), 1, "only one"),
        (("-m", MODEL, "--deterministic"), 1, "GPU"),
        (("-m", MODEL, "--math", "f64"), 1, "f64"),
        (("-m", MODEL, "--fallback", "/nowhere"), 2, "/nowhere"),
        (("-m", MODEL, "--fallback", MODEL), 1, "own name"),
        (("-m", MODEL, "--fallback-name", "x"), 1, "no model"),
        (("-m", MODEL, "--redis", "nowhere"), 1, "HOST:PORT"),
        (("-m", MODEL, "--cors-origin", "a.example"), 1, "--cors-origin"),
        (("-m", MODEL, "--cors-origin", "https://a.example/"), 1, "--cors-origin"),
        (("-m", MODEL, "--redis", "x:0"), 1, "HOST:PORT"),
        (("-m", MODEL, "texts"), 1, "operand"),
        (("-m", MODEL, "--port"), 1, "needs a value"),
    ],
)
def test_usage(args, status, message):
    p = subprocess.run([SERVE, *args], stderr=subprocess.PIPE, timeout=GUARD)
    assert p.returncode == status and message in p.stderr.decode()
    assert p.stderr.startswith(b"qemb-serve: ")
