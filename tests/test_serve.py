"""qemb-serve, driven by the clients that it is for: openai's, curl, raw sockets.

QEMB_SERVE_BIN names another binary (default ./qemb-serve), such as one with sanitizers: their
reports turn up as a wrong exit status. QEMB_BIN: the ./qemb whose vectors must be met bit for bit.
Every server listens on a free port of the loopback and is ended by SIGTERM, with status 0.
"""

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
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parent.parent
SERVE = os.path.abspath(os.environ.get("QEMB_SERVE_BIN", ROOT / "qemb-serve"))
QEMB = os.path.abspath(os.environ.get("QEMB_BIN", ROOT / "qemb"))
MODEL = str(ROOT / "models" / "demo.qemb")
HIDDEN, MAX_TOKENS, EOS, VOCAB = 128, 2048, 2557, 2560
BINARY = Path(SERVE).read_bytes() if os.path.exists(SERVE) else b""
SANITIZED = b"__asan_init" in BINARY or b"__tsan_init" in BINARY
GUARD = 240 if SANITIZED else 60  # seconds after which a hang is one; nothing here is timed
JSON = {"Content-Type": "application/json"}

TEXTS = [
    "An embedding is a list of numbers.",
    "",
    "two",
    "two",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "中文 and русский",
    "nul \0 inside",
    "  spaces  ",
    "a\nnewline",
    "a" * 300,
    "😀",
]


def qemb(*args, records, model=MODEL):
    """What ./qemb answers to JSON records, line by line."""
    data = "".join(json.dumps(r) + "\n" for r in records).encode()
    command = [QEMB, *args[:1], "-m", model, "--input", "jsonl", *args[1:]]
    if args and args[0].startswith("-"):
        command = [QEMB, "-m", model, "--input", "jsonl", *args]
    done = subprocess.run(command, input=data, stdout=subprocess.PIPE, timeout=GUARD)
    assert done.returncode == 0
    return done.stdout.decode().splitlines()


class Answer:
    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        e = self.json["error"]
        assert set(e) == {"message", "type", "param", "code"}
        return e


PATIENT = ("--deadline", "600", "--receive-timeout", "600")  # on a busy machine, too


class Server:
    def __init__(self, *args, model=MODEL, wait="ready"):
        self.log, self.raw, self.changed = [], [], threading.Condition()
        self.process = subprocess.Popen(
            [SERVE, "-m", model, "--port", "0", "--threads", "1", *PATIENT, *map(str, args)],
            stderr=subprocess.PIPE,
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        self.port = self.wait_log("listening")["port"]
        if wait:
            self.wait_log(wait)

    def read(self):
        for line in self.process.stderr:
            with self.changed:
                self.raw.append(line)
                try:
                    self.log.append(json.loads(line))
                except ValueError:
                    self.log.append({"event": "not JSON", "line": line})
                self.changed.notify_all()
        with self.changed:
            self.log.append({"event": "end of log"})
            self.changed.notify_all()

    def wait_log(self, event, n=1):
        """The n-th log line of that event."""

        def found():
            lines = [e for e in self.log if e["event"] == event]
            return lines[n - 1] if len(lines) >= n else None

        with self.changed:
            ends = lambda: found() or (self.log and self.log[-1]["event"] == "end of log")
            assert self.changed.wait_for(ends, GUARD), f"no {event} in the log"
            assert found(), b"".join(self.raw).decode()
            return found()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=GUARD)

    def request(self, method, path, body=None, headers=JSON):
        c = self.connect()
        try:
            c.request(method, path, body, headers)
            return Answer(c.getresponse())
        finally:
            c.close()

    def post(self, body, path="/v1/embeddings", headers=JSON):
        if not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        return self.request("POST", path, body, headers)

    def embed(self, texts, **more):
        a = self.post({"model": "demo", "input": texts, "encoding_format": "base64", **more})
        assert a.status == 200, a.body
        return [e["embedding"] for e in a.json["data"]]

    def metrics(self):
        text = self.request("GET", "/metrics").body.decode()
        return {
            (s.name, tuple(sorted(s.labels.items()))): s.value
            for f in text_string_to_metric_families(text)
            for s in f.samples
        }

    def metric(self, name):
        return self.metrics()[(name, ())]

    def wait_metric(self, name, good):
        until = time.monotonic() + GUARD
        while not good(self.metric(name)):
            assert time.monotonic() < until, f"{name} is {self.metric(name)}"
            time.sleep(0.02)

    def openai(self, **kw):
        kw = {"api_key": "none", "max_retries": 0, "timeout": GUARD, **kw}
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **kw)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(GUARD)
        self.reader.join(GUARD)
        self.process.stderr.close()
        text = b"".join(self.raw).decode(errors="replace")
        assert status == 0, text[-8000:]
        assert not [e for e in self.log if e["event"] == "not JSON"], text[-8000:]


@contextlib.contextmanager
def server(*args, **kw):
    s = Server(*args, **kw)
    try:
        yield s
    except BaseException:
        s.process.kill()
        s.process.wait()
        s.reader.join()
        raise
    s.stop()


@pytest.fixture(scope="module")
def serve():
    with server() as s:
        yield s


LONG = 100 if SANITIZED else 300
# Each long text is a batch of its own, and takes a while.
BUSY_CPU = () if SANITIZED else ("--cpu", "plain")
BUSY = ("--batch-tokens", LONG, *BUSY_CPU)


def long_ids(i, n=LONG):
    """Token ids of a text that is long, and unlike all others: none shares a prefix with it."""
    return [i % 250, i // 250 % 250] + [(i * 7 + k) % 250 for k in range(n - 3)] + [EOS]


def slow_request(n=10, start=0, **more):
    """Work for a while: long texts, all different."""
    return {"model": "demo", "input": [long_ids(start + i) for i in range(n)], "dimensions": 1, **more}


class Slow:
    """A request that keeps the model busy, in its own thread."""

    def __init__(self, s, n=10, start=0, **more):
        self.answer, self.server = None, s
        self.c = s.connect()
        self.c.request("POST", "/v1/embeddings", json.dumps(slow_request(n, start, **more)), JSON)

    def wait(self):
        self.answer = Answer(self.c.getresponse())
        self.c.close()
        return self.answer

    def leave(self):
        self.c.close()


# ---- vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [HIDDEN, 64, 1])
def test_vectors_are_qembs_bit_for_bit(serve, dim):
    want = qemb("--output", "base64", "--dim", str(dim), records=[{"text": t} for t in TEXTS])
    got = serve.openai().embeddings.with_raw_response.create(
        model="demo", input=TEXTS, dimensions=dim, encoding_format="base64"
    )
    body = json.loads(got.text)
    assert [e["embedding"] for e in body["data"]] == want
    assert [e["index"] for e in body["data"]] == list(range(len(TEXTS)))
    assert body["model"] == "demo" and body["object"] == "list"


def test_openai_client_decodes_what_it_asked_for(serve):
    """Left to itself the client asks for base64 and decodes it; asked for floats it gets numbers."""
    client = serve.openai()
    want = [
        np.frombuffer(base64.b64decode(v), "<f4")
        for v in qemb("--output", "base64", records=[{"text": t} for t in TEXTS])
    ]
    for kw in ({}, {"encoding_format": "float"}):
        got = client.embeddings.create(model="demo", input=TEXTS, user="someone", **kw)
        vectors = [np.array(e.embedding, np.float64).astype("<f4") for e in got.data]
        assert all(a.tobytes() == b.tobytes() for a, b in zip(vectors, want, strict=True))


def test_one_string_is_one_vector(serve):
    got = serve.openai().embeddings.create(model="demo", input="two", encoding_format="float")
    assert len(got.data) == 1 and got.data[0].index == 0 and got.data[0].object == "embedding"


def test_token_ids(serve):
    lists = [[1, 2, 3], [1, 2, 3, EOS], [VOCAB - 1], [65]]
    want = qemb("--output", "base64", records=[{"ids": ids} for ids in lists])
    assert serve.embed(lists) == want
    assert serve.embed(lists[0]) == want[:1]
    assert want[0] == want[1]


def test_usage_counts_tokens(serve):
    tokens = [json.loads(l) for l in qemb("tokenize", records=[{"text": t} for t in TEXTS])]
    got = serve.openai().embeddings.create(model="demo", input=TEXTS)
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
        model="demo", input=TEXTS, encoding_format="float", extra_body={"instruct": "Find it"}
    )
    want = qemb("--output", "json", records=records)
    for e, line in zip(got.data, want, strict=True):
        assert np.array_equal(np.float32(e.embedding), np.float32(json.loads(line)))


def test_server_default_prompt():
    with server("--query") as s:
        assert s.embed(["two"]) == qemb("--query", "--output", "base64", records=[{"text": "two"}])
        assert s.embed(["two"], instruct="") == qemb("--output", "base64", records=[{"text": "two"}])
        assert s.embed(["two"], instruct="T") == qemb(
            "--output", "base64", records=[{"text": "two", "instruct": "T"}]
        )


def test_truncate(serve):
    text = "word " * MAX_TOKENS
    want = qemb("--truncate", "--output", "base64", records=[{"text": text}])
    assert serve.embed([text], truncate=True) == want
    a = serve.post({"model": "demo", "input": ["x", text]})
    assert a.status == 400 and a.error["code"] == "context_length_exceeded"
    assert a.error["message"].startswith("input[1]:")


@pytest.mark.parametrize("model", ["gqa2", "square", "massive"])
def test_other_models(model):
    path = str(ROOT / "tests" / "golden" / f"{model}.qemb")
    info = subprocess.run([QEMB, "info", path], stdout=subprocess.PIPE, check=True).stdout.decode()
    vocab = int(re.search(r"vocabulary +(\d+)", info)[1])
    lists = [[k % vocab for k in range(i, 3 * i)] for i in range(1, 12)]
    want = qemb("--output", "base64", records=[{"ids": ids} for ids in lists], model=path)
    with server("--name", "demo", model=path) as s:
        assert s.embed(lists) == want


def test_many_clients_get_their_own_vectors(serve):
    texts = [f"text {i % 150} of many" for i in range(300)]
    want = qemb("--output", "base64", records=[{"text": t} for t in texts])
    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(lambda t: serve.embed([t])[0], texts))
    assert got == want


# ---- errors ---------------------------------------------------------------------------------------

OK = {"model": "demo", "input": "x"}
BAD = [
    (b"", 400, "invalid_json", None),
    (b"{", 400, "invalid_json", None),
    (b'{"model":"demo","input":"x"', 400, "invalid_json", None),
    (b'{"model":"demo","input":"\xff"}', 400, "invalid_json", None),
    (b'{"model":"demo","input":"\\ud800"}', 400, "invalid_json", None),
    (b'{"model":"demo","input":"x","input":"y"}', 400, "invalid_json", None),
    (b"[" * 100000, 400, "invalid_json", None),
    ([1], 400, "invalid_json", None),
    ({"model": "demo"}, 400, "missing_parameter", "input"),
    ({"input": "x"}, 400, "missing_parameter", "model"),
    ({**OK, "model": None}, 400, "missing_parameter", "model"),
    ({**OK, "model": 3}, 400, "invalid_type", "model"),
    ({**OK, "model": "other"}, 404, "model_not_found", "model"),
    ({**OK, "input": None}, 400, "invalid_type", "input"),
    ({**OK, "input": {}}, 400, "invalid_type", "input"),
    ({**OK, "input": []}, 400, "empty_input", "input"),
    ({**OK, "input": [[]]}, 400, "empty_input", "input"),
    ({**OK, "input": [True]}, 400, "invalid_type", "input"),
    ({**OK, "input": ["x", None]}, 400, "invalid_type", "input"),
    ({**OK, "input": ["x", 1]}, 400, "invalid_type", "input"),
    ({**OK, "input": [1, "x"]}, 400, "invalid_type", "input"),
    ({**OK, "input": [[1], 1]}, 400, "invalid_type", "input"),
    ({**OK, "input": [1.0]}, 400, "invalid_type", "input"),
    ({**OK, "input": [[1], [1.5]]}, 400, "invalid_type", "input"),
    ({**OK, "input": [-1]}, 400, "invalid_token", "input"),
    ({**OK, "input": [[1], [VOCAB]]}, 400, "invalid_token", "input"),
    ({**OK, "input": [2**31]}, 400, "invalid_token", "input"),
    ({**OK, "input": [1] * (MAX_TOKENS + 1)}, 400, "context_length_exceeded", "input"),
    ({**OK, "input": ["x"] * 2049}, 400, "too_many_inputs", "input"),
    ({**OK, "dimensions": 0}, 400, "invalid_dimensions", "dimensions"),
    ({**OK, "dimensions": HIDDEN + 1}, 400, "invalid_dimensions", "dimensions"),
    ({**OK, "dimensions": 2**63 - 1}, 400, "invalid_dimensions", "dimensions"),
    ({**OK, "dimensions": "8"}, 400, "invalid_type", "dimensions"),
    ({**OK, "encoding_format": "hex"}, 400, "invalid_encoding_format", "encoding_format"),
    ({**OK, "encoding_format": 1}, 400, "invalid_type", "encoding_format"),
    ({**OK, "truncate": "yes"}, 400, "invalid_type", "truncate"),
    ({**OK, "fallback": 1}, 400, "invalid_type", "fallback"),
    ({**OK, "instruct": 1}, 400, "invalid_type", "instruct"),
    ({**OK, "input": [1], "instruct": "x"}, 400, "invalid_instruct", "instruct"),
    ({**OK, "dimension": 4}, 400, "unknown_parameter", None),
]


@pytest.mark.parametrize("body,status,code,param", BAD)
def test_bad_requests(serve, body, status, code, param):
    a = serve.post(body)
    assert (a.status, a.error["code"], a.error["param"]) == (status, code, param)
    assert a.error["type"] == "invalid_request_error" and a.error["message"]
    assert a.headers["Content-Type"] == "application/json"


def test_null_counts_as_not_given(serve):
    more = {"dimensions": None, "encoding_format": None, "user": None, "instruct": None,
            "truncate": None, "fallback": None}
    assert serve.post({**OK, **more}).status == 200


def test_openai_client_sees_its_own_errors(serve):
    client = serve.openai()
    with pytest.raises(openai.NotFoundError) as e:
        client.embeddings.create(model="other", input="x")
    assert e.value.code == "model_not_found" and e.value.param == "model"
    with pytest.raises(openai.BadRequestError) as e:
        client.embeddings.create(model="demo", input="x", dimensions=HIDDEN + 1)
    assert e.value.param == "dimensions" and e.value.request_id


def test_paths_and_methods(serve):
    assert serve.request("GET", "/").error["code"] == "unknown_url"
    assert serve.request("GET", "/v1/embedding").status == 404
    assert serve.post(OK, "/v1/embeddings/").status == 404
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
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/jsonp"}, 415),
        ({"Content-Type": "application/json; charset=latin-1"}, 415),
        ({**JSON, "Content-Encoding": "gzip"}, 415),
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
    assert serve.post(OK, headers={**JSON, "X-Request-Id": "me-1.2_3"}).headers["x-request-id"] == "me-1.2_3"
    ids = {serve.post(OK).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5
    for bad in ['"', "a b", "x" * 65]:
        assert serve.post(OK, headers={**JSON, "X-Request-Id": bad}).headers["x-request-id"] != bad


def test_api_keys(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# two keys\nfirst-key\n\nsecond-key\r\n")
    with server("--api-key-file", keys) as s:
        for key in ("first-key", "second-key"):
            assert s.openai(api_key=key).embeddings.create(model="demo", input="x").data
        with pytest.raises(openai.AuthenticationError) as e:
            s.openai(api_key="third-key").embeddings.create(model="demo", input="x")
        assert e.value.code == "invalid_api_key"
        for headers in (
            {},
            {"Authorization": "first-key"},
            {"Authorization": "Bearer "},
            {"Authorization": "Bearer first-ke"},
            {"Authorization": "Bearer first-key2"},
            {"Authorization": "Bearer # two keys"},
        ):
            for method, path in (("POST", "/v1/embeddings"), ("POST", "/tokenize"), ("GET", "/v1/models")):
                a = s.request(method, path, json.dumps(OK), {**JSON, **headers})
                assert a.status == 401 and a.headers["WWW-Authenticate"] == "Bearer"
        assert s.request("GET", "/health").status == s.request("GET", "/metrics").status == 200


# ---- models, health, metrics, log -----------------------------------------------------------------


def test_models():
    with server("--name", "one", "--name", "two") as s:
        client = s.openai()
        assert [m.id for m in client.models.list()] == ["one", "two"]
        assert client.embeddings.create(model="two", input="x").model == "one"
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="demo", input="x")


def test_curl(serve, tmp_path):
    """As a user would: curl's own idea of a POST, and a body so large that it asks first."""
    if not shutil.which("curl"):
        pytest.skip("curl: not installed")
    url = f"http://127.0.0.1:{serve.port}/v1/embeddings"
    out = subprocess.run(
        ["curl", "-sS", "--json", json.dumps({**OK, "encoding_format": "base64"}), url],
        stdout=subprocess.PIPE, timeout=GUARD, check=True,
    ).stdout
    want = qemb("--output", "base64", records=[{"text": "x"}])
    assert [e["embedding"] for e in json.loads(out)["data"]] == want
    body = tmp_path / "body"
    body.write_text(json.dumps(OK) + " " * (2 << 20))
    out = subprocess.run(
        ["curl", "-sS", "-w", "%{http_code}", "-o", "/dev/null", "--json", f"@{body}", url],
        stdout=subprocess.PIPE, timeout=GUARD, check=True,
    ).stdout
    assert out == b"200"


def test_metrics():
    with server() as s:
        before = s.metrics()
        s.embed(["metrics one", "metrics two", "metrics one"])
        s.post(b"{")
        # a request counts when its answer is sent, which its client may see first
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
        s.post({"model": "demo", "input": secret * 4000})
        s.request("GET", f"/{secret}?{secret}", None, {name: secret})
        c = s.connect()
        c.sock = socket.create_connection(("127.0.0.1", s.port), GUARD)
        c.sock.sendall(secret.encode() + b"\r\n\r\n")
        c.sock.recv(1000)
        c.close()
        s.wait_log("request", 6)
    log = b"".join(s.raw)
    assert secret.encode() not in log
    lines = sorted((e for e in s.log if e["event"] == "request"), key=lambda e: e["status"])
    assert [e["status"] for e in lines][:6] == [200, 400, 400, 400, 404, 404]
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
    """The demo model with an infinite number in the embedding of a token."""
    path = tmp_path / "broken.qemb"
    data = bytearray(Path(MODEL).read_bytes())
    _, _, cols, offset, _ = sections(MODEL)["tok_emb"]
    struct.pack_into("<H", data, offset + 2 * cols * token, 0x7C00)
    path.write_bytes(data)
    return str(path)


def test_a_text_without_a_vector(tmp_path):
    """Never a zero vector, never a null: an error that names the text; and health comes back."""
    with server("--name", "demo", model=broken_model(tmp_path, 65)) as s:
        a = s.post({"model": "demo", "input": [[66], [65], [67]]})
        assert a.status == 422 and a.error["code"] == "non_finite"
        assert a.error["message"].startswith("input[1]:")
        s.wait_log("failing")
        s.wait_log("ready", 2)  # by a probe of its own
        assert s.request("GET", "/health").status == 200
        assert len(s.embed([[66], [67]])) == 2


def test_a_model_that_computes_nothing(tmp_path):
    with server("--name", "demo", model=broken_model(tmp_path, EOS), wait="failing") as s:
        a = s.request("GET", "/health")
        assert a.status == 503 and a.json == {"status": "failing"}
        assert s.post(OK).status == 422
        assert s.metric("qemb_healthy") == 0


def test_a_client_may_send_what_the_probe_sends(tmp_path):
    """The empty text and a probe that wait for the same batch are one text, not two in one row."""
    with server(*BUSY, "--name", "demo", model=broken_model(tmp_path, EOS), wait="failing") as s:
        slow = Slow(s)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        for _ in range(3):
            a = s.post({"model": "demo", "input": ["", "other"]})
            assert a.status == 422 and a.error["message"].startswith("input[0]:")
        assert slow.wait().status == 422


# ---- the fallback ---------------------------------------------------------------------------------

TINY = str(ROOT / "tests" / "golden" / "hf-tiny.qemb")  # hidden 32, a tokenizer of its own, 200 tokens
SHORT = [t for t in TEXTS if len(t) < 200]


def vectors_of(texts, model, *args):
    return qemb("--output", "base64", *args, records=[{"text": t} for t in texts], model=model)


def vectors_in(a):
    assert a.status == 200, a.body
    return [e["embedding"] for e in a.json["data"]]


def ask(texts, **more):
    return {"model": "demo", "input": texts, "encoding_format": "base64", **more}


def test_fallback_when_the_queue_is_full():
    n = 20
    text = lambda i: f"{i:03}" + "0123456789" * 3  # a digit is a token in both models
    with server(*BUSY, "--max-queue", n * LONG, "--fallback", TINY) as s:
        count = lambda texts: s.post({"input": texts}, "/tokenize").json["usage"]["total_tokens"]
        texts = [text(i) for i in range(n * LONG // count([text(0)]))]
        assert (n - 1) * LONG < count(texts) <= n * LONG  # no place as long as a long text waits
        want = vectors_of(texts, TINY, *BUSY_CPU)
        want7 = vectors_of(texts, TINY, "--dim", "7", *BUSY_CPU)
        s.wait_log("ready", 2)
        assert s.post(ask(["x"], fallback=True)).json["model"] == "demo"  # it has no need of it
        slow = Slow(s, n)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        a = s.post(ask(texts))
        assert a.status == 429 and a.error["code"] == "queue_full"
        assert s.post(ask(texts, fallback=False)).status == 429
        a = s.post(ask(texts, fallback=True))
        assert vectors_in(a) == want and a.json["model"] == "hf-tiny"
        a = s.post(ask(texts, fallback=True, dimensions=7))  # from the cache, cut
        assert vectors_in(a) == want7 and a.json["model"] == "hf-tiny"
        got = s.openai().embeddings.create(model="demo", input=texts, extra_body={"fallback": True})
        assert got.model == "hf-tiny" and len(got.data[0].embedding) == 32
        # more than the fallback has: the first answer stands
        assert s.post(ask(texts, fallback=True, dimensions=33)).status == 429
        assert s.post(ask([*texts[:-7], "1" * 205], fallback=True)).status == 429
        assert s.metric("qemb_queue_tokens") > 0, "the queue was to be full all the time"
        assert s.metric("qemb_fallbacks_total") == 3
        assert slow.wait().status == 200
        assert s.post(ask(["y"], fallback=True)).json["model"] == "demo"
    assert [e["fallback"] for e in s.log if e["event"] == "request"].count(True) == 3


def test_fallback_when_the_model_fails(tmp_path):
    broken = broken_model(tmp_path, EOS)
    with server("--name", "demo", "--fallback", TINY, "--fallback-name", "small", model=broken,
                wait="failing") as s:
        s.wait_log("ready")
        a = s.post(ask(SHORT, fallback=True))
        assert vectors_in(a) == vectors_of(SHORT, TINY) and a.json["model"] == "small"
        words = [json.loads(l) for l in qemb("tokenize", records=[{"text": t} for t in SHORT], model=TINY)]
        assert a.json["usage"]["total_tokens"] == sum(map(len, words))
        a = s.post(ask(SHORT, fallback=True, instruct="T"))
        want = [{"text": t, "instruct": "T"} for t in SHORT]
        assert vectors_in(a) == qemb("--output", "base64", records=want, model=TINY)
        assert s.post(ask(SHORT)).status == s.post(ask([[1, 2]], fallback=True)).status == 422
        a = s.request("GET", "/health")
        assert a.status == 503 and a.json == {"status": "failing", "fallback": "ok"}
        assert s.metric("qemb_fallbacks_total") == 2 and s.metric("qemb_healthy") == 0


def test_a_fallback_that_fails_is_no_help(tmp_path):
    broken = broken_model(tmp_path, EOS)
    with server("--name", "demo", "--fallback", broken, model=broken, wait=None) as s:
        s.wait_log("failing", 2)
        a = s.post(ask(["x"], fallback=True))
        assert a.status == 422 and s.metric("qemb_fallbacks_total") == 0


def test_two_models_share_no_vectors(redis):
    with server(*with_redis(redis.port), "--fallback", TINY) as s:
        s.wait_log("ready", 2)
        want = [vectors_of(SHORT, m) for m in (MODEL, TINY)]
        ids = [[1, 2, 3], [4]]  # which are other texts, or none, for the other model
        for n in range(2):
            for model, vectors in zip(("demo", "hf-tiny"), want):
                a = s.post(ask(SHORT, model=model))
                assert vectors_in(a) == vectors and a.json["model"] == model
            same = [vectors_in(s.post(ask(ids, model=m, dimensions=8))) for m in ("demo", "hf-tiny")]
            assert same[0][0] != same[1][0] and same[0][1] != same[1][1]
        wait_stored(redis, 2 * (len(set(SHORT)) + len(ids)))
        assert [m.id for m in s.openai().models.list()] == ["demo", "hf-tiny"]
        models = [dict(k[1])["model"] for k in s.metrics() if k[0] == "qemb_model_info"]
        assert models == ["demo", "hf-tiny"]
        assert s.metric("qemb_fallbacks_total") == 0


# ---- the queue ------------------------------------------------------------------------------------


def test_equal_texts_in_flight_are_computed_once():
    with server(*BUSY) as s:
        slow = Slow(s)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        many = [s.connect() for _ in range(20)]
        for i, c in enumerate(many):
            c.request("POST", "/v1/embeddings", json.dumps(ask(["the same", f"other {i % 2}"])), JSON)
        vectors = [vectors_in(Answer(c.getresponse())) for c in many]
        for c in many:
            c.close()
        assert slow.wait().status == 200
        assert len({v[0] for v in vectors}) == 1 and len({v[1] for v in vectors}) == 2
        m = s.metrics()
        # a round or more: the first may have been taken before the last came, which the cache then has
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
        log = [e for e in s.log if e["event"] == "request" and e["texts"] == 10]
        assert log[0]["status"] == 499


def test_full_queue():
    with server(*BUSY, "--max-queue", 20 * LONG // 3) as s:
        client = s.openai()
        slow = [Slow(s, 6, 10 * i) for i in range(6)]  # nine tenths of the queue each
        with pytest.raises(openai.RateLimitError) as e:
            for i in range(6):
                client.embeddings.create(model="demo", input=[long_ids(500 + 10 * i + k) for k in range(6)])
        assert e.value.code == "queue_full"
        assert int(e.value.response.headers["retry-after"]) >= 1
        answers = [x.wait() for x in slow]
        assert {a.status for a in answers} == {200, 429}
        a = s.post(slow_request(8))
        assert a.status == 413 and a.error["code"] == "too_many_tokens"


def test_deadline():
    with server(*BUSY, "--deadline", 1) as s:
        answers = [x.wait() for x in [Slow(s, 150, 1000 * i) for i in range(2)]]
        for a in answers:
            assert a.status == 503 and a.error["code"] == "deadline_exceeded"
            assert int(a.headers["Retry-After"]) >= 1
        s.wait_metric("qemb_queue_tokens", lambda x: x == 0)
        # the client that is told to come back comes back
        assert s.openai(max_retries=9).embeddings.create(model="demo", input="afterwards").data


# ---- attacks --------------------------------------------------------------------------------------


def raw(s, data=b""):
    k = socket.create_connection(("127.0.0.1", s.port), GUARD)
    k.sendall(data)
    return k


def drained(k):
    """All that comes until the server closes."""
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
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
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
                c.request("POST", "/v1/embeddings", iter([data]) if chunked else data, JSON,
                          encode_chunked=chunked)
                a = Answer(c.getresponse())
                assert a.status == status, (extra, chunked)
                assert status == 200 or a.error["code"] == "body_too_large"
                # what was refused was read: the connection is good for more
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
        body = {"model": "demo", "input": [long_ids(i) for i in range(10)] + [[1]] * 380}
        c = s.connect()
        c.request("POST", "/v1/embeddings", json.dumps(body), JSON)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        a = s.post(body)
        assert a.status == 429 and a.error["code"] == "server_overloaded"
        assert int(a.headers["Retry-After"]) >= 1
        assert Answer(c.getresponse()).status == 200
        c.close()


def test_slow_clients_are_closed():
    """Drips of a header, of a body, an idle connection and a reader that does not read."""
    with server("--receive-timeout", 1) as s:
        slow = [raw(s, b"POST /v1/emb") for _ in range(20)]
        slow += [raw(s, head(1000) + b"{") for _ in range(20)]
        slow += [raw(s) for _ in range(20)]
        lazy = raw(s)
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"model": "demo", "input": ["x"] * 2000}).encode()
        lazy.sendall(head(len(body)) + body)
        left = set(slow)
        until = time.monotonic() + GUARD
        while left and time.monotonic() < until:
            for k in list(left):
                try:
                    k.send(b"x")
                    if not k.recv(1, socket.MSG_DONTWAIT):
                        left.discard(k)
                except BlockingIOError:
                    pass
                except OSError:
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
        body = [json.dumps({**OK, "input": f"text {i}", "dimensions": 4}).encode() for i in range(1000)]
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


# ---- load ------------------------------------------------------------------------------------------

CHINESE = "今天天气很好，我们去公园散步吧。"


def tool(name):
    found = shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))
    if not found:
        pytest.skip(f"{name}: not installed")
    return found


def run_tool(*args, **kw):
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=GUARD, **kw)
    out = done.stdout.decode()
    assert done.returncode == 0, out
    return out


def test_wrk(serve, tmp_path):
    script = tmp_path / "ask.lua"
    script.write_text(
        f'''wrk.method, wrk.body = "POST", [[{json.dumps({**OK, "input": CHINESE})}]]
        wrk.headers["Content-Type"] = "application/json"'''
    )
    url = f"http://127.0.0.1:{serve.port}/v1/embeddings"
    out = run_tool(tool("wrk"), "-t", "2", "-c", "64", "-d", "1s", "--timeout", "60s", "-s", script, url)
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
    assert re.search(r"Complete requests: +600", out) and re.search(r"Failed requests: +0", out), out
    assert "Non-2xx" not in out, out


def test_locust(serve):
    url = f"http://127.0.0.1:{serve.port}"
    args = ["-f", str(ROOT / "tests" / "locustfile.py"), "--host", url, "--headless", "--only-summary"]
    run_tool(tool("locust"), *args, "-u", "20", "-r", "20", "-t", "2s", "--exit-code-on-error", "1")


# ---- the end --------------------------------------------------------------------------------------


def test_term_under_load():
    """Whatever was sent on a connection that the server took is answered, in full."""
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
                return  # it does not listen any more
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
    assert a.status == 503 and a.json == {"status": "draining"} and a.headers["Connection"] == "close"
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
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{s.process.pid}/status").read_text())[1])

    def some(n):
        c = s.connect()
        for i in range(n):
            c.request("POST", "/v1/embeddings", json.dumps({**OK, "input": f"a text {i % 500}"}), JSON)
            assert Answer(c.getresponse()).status == 200
        c.close()

    with server() as s:
        some(1000)
        before = rss()
        some(2000)
        assert rss() - before < 1000  # KiB: half a KiB per request would show


# ---- caches ---------------------------------------------------------------------------------------


def test_cache_serves_every_dimension():
    texts = [t for t in TEXTS if t != "two"]
    with server() as s:
        s.embed(texts)
        computed = s.metric("qemb_computed_texts_total")
        for dim in (HIDDEN, 17, 1):
            want = qemb("--output", "base64", "--dim", str(dim), records=[{"text": t} for t in texts])
            assert s.embed(texts, dimensions=dim) == want
        assert s.metric("qemb_computed_texts_total") == computed
        assert s.metric("qemb_cache_hits_total") == 3 * len(texts) + 1
        assert s.metric("qemb_cache_misses_total") == len(texts) - 1  # the probe was the empty one
        assert s.metric("qemb_cache_bytes") > 4 * HIDDEN * len(texts)
        assert s.embed([texts[0], "new"])[0] == s.embed(texts)[0]  # a known one beside a new one
        assert s.embed([texts[0]], instruct="T") != s.embed([texts[0]])


def test_no_cache():
    with server("--cache", 0) as s:
        assert s.embed(["x"]) == s.embed(["x"])
        assert s.metric("qemb_cache_hits_total") == s.metric("qemb_cache_bytes") == 0
        assert s.metric("qemb_computed_texts_total") == 3


def test_cache_is_bounded():
    with server("--cache", 1) as s:
        for i in range(0, 4000, 400):
            s.embed([[k % 250, k // 250 + 1] for k in range(i, i + 400)], dimensions=1)
            assert s.metric("qemb_cache_bytes") <= 1 << 20
        assert s.metric("qemb_cache_bytes") > 900000


def free_port():
    with socket.socket() as k:
        k.bind(("127.0.0.1", 0))
        return k.getsockname()[1]


def with_redis(port):
    """Options of a server that waits for that Redis, on a busy machine too."""
    return ("--redis", f"127.0.0.1:{port}", "--redis-timeout", 60000)


class Redis:
    def __init__(self, port=None):
        self.port = port or free_port()
        self.process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no", "--daemonize", "no"],
            stdout=subprocess.DEVNULL, cwd="/tmp",
        )
        until = time.monotonic() + GUARD
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as k:
                k.sendall(b"PING\r\n")
                if k.recv(5) == b"+PONG":
                    return
            assert time.monotonic() < until and self.process.poll() is None
            time.sleep(0.02)

    def command(self, *words, lines=0):
        """The first line of the reply; or a list of so many."""
        with socket.create_connection(("127.0.0.1", self.port), GUARD) as k:
            f = k.makefile("rwb")
            f.write(b"*%d\r\n" % len(words))
            for w in words:
                f.write(b"$%d\r\n%s\r\n" % (len(w), w))
            f.flush()
            got = [f.readline().removesuffix(b"\r\n") for _ in range(lines or 1)]
            return got if lines else got[0]

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis():
    if not shutil.which("redis-server"):
        pytest.skip("redis-server: not installed")
    r = Redis()
    yield r
    r.kill()


def wait_stored(r, n):
    until = time.monotonic() + GUARD
    while int(r.command(b"DBSIZE")[1:]) < n:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_redis_is_shared(redis):
    texts = [f"shared {i}" for i in range(40)]
    with server("--cache", 0, *with_redis(redis.port)) as a:
        want = a.embed(texts)
        wait_stored(redis, 41)  # the probe's, too
    with server("--cache", 0, *with_redis(redis.port)) as b:
        assert b.embed(texts) == want
        assert b.embed([*texts[:3], "unknown"], dimensions=5)[:3] == [
            base64.b64encode(v).decode() for v in
            [base64.b64decode(x) for x in qemb("--output", "base64", "--dim", "5", records=[{"text": t} for t in texts[:3]])]
        ]
        assert b.metric("qemb_redis_hits_total") == 43
        assert b.metric("qemb_computed_texts_total") == 2  # the probe and the unknown one


def test_models_do_not_share_keys(redis, tmp_path):
    with server(*with_redis(redis.port)) as a:
        one = a.embed([[1, 2]])
        wait_stored(redis, 2)
    other = tmp_path / "other.qemb"  # one weight differs, and with it the recorded digest
    data = bytearray(Path(MODEL).read_bytes())
    data[40] ^= 1
    struct.pack_into("<Q", data, 24, 0)
    checksum = 0xCBF29CE484222325
    for b in data[: 4096 + 96 * struct.unpack_from("<I", data, 32)[0]]:
        checksum = (checksum ^ b) * 0x100000001B3 % 2**64
    struct.pack_into("<Q", data, 24, checksum)
    other.write_bytes(data)
    with server(*with_redis(redis.port), "--name", "demo", model=str(other)) as b:
        assert b.embed([[1, 2]]) == one and b.metric("qemb_redis_hits_total") == 0


def test_arithmetics_share_no_vectors(redis):
    lists, stored = [[1, 2, 3], [4, 5]], 0
    for math in ("f32", "bf16", "int8"):
        command = [QEMB, "-m", MODEL, "--math", math, "--input", "jsonl", "--output", "base64"]
        records = "".join(json.dumps({"ids": ids}) + "\n" for ids in lists).encode()
        done = subprocess.run(command, input=records, stdout=subprocess.PIPE, timeout=GUARD)
        if done.returncode == 1:
            continue  # not on this machine
        with server(*with_redis(redis.port), "--math", math) as s:
            assert s.embed(lists) == done.stdout.decode().splitlines()
            assert s.metric("qemb_redis_hits_total") == 0
            stored += 1 + len(lists)
            wait_stored(redis, stored)
    assert stored


def test_wrong_values_in_redis_are_misses(redis):
    with server("--cache", 0, *with_redis(redis.port)) as s:
        wait_stored(redis, 1)  # the probe's text, the empty one: there is one key
        want = s.embed([""])
        key = redis.command(b"KEYS", b"*", lines=3)[2]
        good = redis.command(b"GET", key, lines=2)
        for value in (b"", b"short", b"\0" * 4 * HIDDEN, b"\xff" * 4 * HIDDEN):
            assert redis.command(b"SET", key, value) == b"+OK"
            hits = s.metric("qemb_redis_hits_total")
            assert s.embed([""]) == want
            assert s.metric("qemb_redis_hits_total") == hits
            # What was computed is stored when there is time; not again, if the probe's batch had not quite
            # ended and gave it.
            until = time.monotonic() + GUARD
            while redis.command(b"GET", key, lines=2) != good:
                assert time.monotonic() < until
                assert s.embed([""]) == want
                time.sleep(0.02)
        assert s.metric("qemb_redis_errors_total") == 0


def test_redis_absent_slow_or_babbling():
    listening = socket.create_server(("127.0.0.1", 0))  # takes connections, says nothing
    babbler = socket.create_server(("127.0.0.1", 0))

    def babble():
        with contextlib.suppress(OSError):
            while True:
                k, _ = babbler.accept()
                k.sendall(b"HTTP/1.1 200 OK\r\n" * 10)
                k.close()

    threading.Thread(target=babble, daemon=True).start()
    ports = [free_port(), listening.getsockname()[1], babbler.getsockname()[1]]
    for port in ports:
        with server("--cache", 0, "--redis", f"127.0.0.1:{port}") as s:
            for i in range(20):
                assert s.embed([f"text {i}"])
            assert s.metric("qemb_redis_errors_total") >= 1
            assert s.metric("qemb_redis_hits_total") == 0
    listening.close()
    babbler.shutdown(socket.SHUT_RDWR)
    babbler.close()


def test_redis_killed_under_load(redis):
    with server("--cache", 0, "--redis", f"127.0.0.1:{redis.port}") as s:
        done = []

        def client(i):
            for n in range(60):
                done.append(s.embed([f"load {(i + n) % 50}"]))
                if len(done) == 100:
                    redis.kill()

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(client, range(6)))
        assert len(done) == 360 and redis.process.poll() is not None
        s.wait_log("redis_down")
        again = Redis(redis.port)  # it comes back, and is used again
        try:
            until = time.monotonic() + GUARD
            while not [e for e in s.log if e["event"] == "redis_up"]:
                s.embed(["wake up"])
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            again.kill()


# ---- usage ----------------------------------------------------------------------------------------


def test_manual_and_deployment_name_what_there_is(serve):
    text = subprocess.run([SERVE, "--help"], stdout=subprocess.PIPE, timeout=GUARD).stdout.decode()
    options = set(re.findall(r"--[a-z][a-z-]+", text))
    manual = re.sub(r"\\f.|\\(?=-)", "", (ROOT / "qemb-serve.1").read_text())
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", manual)) | {"--help", "--version"} == options
    metrics = serve.request("GET", "/metrics").body.decode()
    for path in (ROOT / "deploy").iterdir():
        deploy = path.read_text()
        own = re.sub(r"(apt-get|useradd|docker|make|--from).*|--no-install-recommends", "", deploy)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", own)) <= options, path
        assert all(f"\n{name} " in metrics for name in re.findall(r"\bqemb_\w+", deploy)), path


@pytest.mark.parametrize(
    "args,status,message",
    [
        ((), 1, "no model"),
        (("-m", "/nowhere"), 2, "/nowhere"),
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
        (("-m", MODEL, "--redis", "x:0"), 1, "HOST:PORT"),
        (("-m", MODEL, "texts"), 1, "operand"),
        (("-m", MODEL, "--port"), 1, "needs a value"),
    ],
)
def test_usage(args, status, message):
    p = subprocess.run([SERVE, *args], stderr=subprocess.PIPE, timeout=GUARD)
    assert p.returncode == status and message in p.stderr.decode()
    assert p.stderr.startswith(b"qemb-serve: ")
