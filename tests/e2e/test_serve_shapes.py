"""The shapes of requests that public clients send to qemb-serve, in plain HTTP: keys, headers,
paths, encodings, and the APIs of text-embeddings-inference and Ollama."""

import base64
import gzip
import hashlib
import json
import time
import zlib

import numpy as np
import pytest
from edit_qemb import Qemb
from serve_client import (  # noqa: F401 - serve is a fixture
    EOS,
    GUARD,
    HIDDEN,
    JSON,
    MAX_TOKENS,
    MODEL,
    OK,
    ROOT,
    TEXTS,
    TINY,
    ask,
    qemb,
    serve,
    server,
    vectors_in,
    vectors_of,
)

PAIR = ["first text", "second text"]
PROMPTS = {"query": "Q: ", "document": "D: ", "text-matching": "T: "}


def with_prompts(path, prompts):
    model = Qemb(MODEL)
    model.prompts = prompts
    model.write(path)
    return str(path)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """A server whose model has prompts that differ."""
    path = with_prompts(tmp_path_factory.mktemp("prompts") / "small.qemb", PROMPTS)
    with server("--query", model=path) as s:
        yield s


def behind(prompt, texts):
    return vectors_of([prompt + t for t in texts], MODEL)


def floats(texts, dim=HIDDEN, **more):
    """Unit vectors from the pipe."""
    lines = qemb("--dim", str(dim), "--output", "base64", records=[{"text": t} for t in texts])
    return np.array([np.frombuffer(base64.b64decode(l), "<f4") for l in lines])


# ---- prompts by name -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key,name,prompt",
    [
        ("input_type", "query", "Q: "),
        ("input_type", "search_query", "Q: "),
        ("input_type", "passage", "D: "),
        ("input_type", "document", "D: "),
        ("input_type", "search_document", "D: "),
        ("task", "retrieval.query", "Q: "),
        ("task", "retrieval.passage", "D: "),
        ("task", "text-matching", "T: "),
        ("prompt_name", "query", "Q: "),
        ("prompt_name", "text-matching", "T: "),
        ("input_type", None, "Q: "),  # the server's --query
    ],
)
def test_prompts_by_name(prompted, key, name, prompt):
    assert prompted.embed(PAIR, **{key: name}) == behind(prompt, PAIR)
    a = prompted.post({"input": PAIR, key: name}, "/tokenize")
    words = qemb("tokenize", records=[{"text": prompt + t} for t in PAIR])
    assert [d["tokens"] for d in a.json["data"]] == [json.loads(w) for w in words]


def test_unknown_prompts_list_the_models_own(prompted):
    for key, name in (
        ("input_type", "classification"),
        ("task", "code.query"),
        ("prompt_name", "search_query"),
        ("prompt_name", "passage"),
        ("prompt_name", ""),
    ):
        a = prompted.post(ask(PAIR, **{key: name}))
        assert (a.status, a.error["code"], a.error["param"]) == (400, "unknown_prompt", key)
        assert all(p in a.error["message"] for p in PROMPTS)


def test_contradicting_prompts(prompted):
    for more in (
        {"instruct": "T", "input_type": "query"},
        {"instruct": "", "task": "retrieval.query"},
        {"input_type": "query", "prompt_name": "document"},
        {"instruct": "T", "instruction": "U"},
    ):
        assert prompted.post(ask(PAIR, **more)).error["code"] == "conflicting_parameters"
    a = prompted.post({"input": [[1, EOS]], "input_type": "query"})
    assert (a.status, a.error["code"]) == (400, "invalid_instruct")
    assert prompted.post({"input": [[1, EOS]]}).status == 200


def test_models_with_other_prompts(tmp_path):
    passage = with_prompts(tmp_path / "small.qemb", {"query": "Q: ", "passage": "P: "})
    with server(model=passage) as s:
        for name in ("document", "passage", "search_document", "retrieval.passage"):
            assert s.embed(PAIR, input_type=name) == behind("P: ", PAIR)
    (tmp_path / "none").mkdir()
    with server(model=with_prompts(tmp_path / "none" / "small.qemb", {})) as s:
        assert s.embed(PAIR, input_type="document") == behind("", PAIR)
        a = s.post(ask(PAIR, input_type="query"))
        assert (a.status, a.error["code"]) == (400, "unknown_prompt")


# ---- truncation ----------------------------------------------------------------------------------

LONG_TEXT = "word " * MAX_TOKENS


@pytest.mark.parametrize(
    "more",
    [
        {"truncate": "END"},
        {"truncate": "end"},
        {"truncation": True},
        {"truncate_prompt_tokens": -1},
        {"truncate_prompt_tokens": -1, "truncation_side": "right"},
        {"truncate": True, "truncation_direction": "Right"},
    ],
)
def test_ways_to_truncate(serve, more):
    want = qemb("--truncate", "--output", "base64", records=[{"text": LONG_TEXT}])
    assert serve.embed([LONG_TEXT], **more) == want


def test_ways_not_to_truncate(serve):
    for more in {"truncate": "NONE"}, {"truncation": False}, {"truncate_prompt_tokens": None}:
        a = serve.post(ask([LONG_TEXT], **more))
        assert a.error["code"] == "context_length_exceeded"
    for more, code in (
        ({"truncate": "START"}, "invalid_truncation_direction"),
        ({"truncation_side": "left"}, "invalid_truncation_direction"),
        ({"truncation_direction": "Left"}, "invalid_truncation_direction"),
        ({"truncate": "END", "truncation": False}, "conflicting_parameters"),
        ({"truncate": False, "truncate_prompt_tokens": -1}, "conflicting_parameters"),
        ({"truncate_prompt_tokens": 4}, "invalid_truncation"),  # vLLM: the last 4
        ({"truncate_prompt_tokens": 0}, "invalid_number"),
        ({"truncate_prompt_tokens": "4"}, "invalid_type"),
    ):
        a = serve.post(ask(["x"], **more))
        assert (a.status, a.error["code"]) == (400, code), more


def test_a_shorter_limit(serve):
    text = "one two three four five six"
    words = json.loads(qemb("tokenize", records=[{"text": text}])[0])
    right = {"truncation_side": "right"}
    for n in range(1, len(words) + 2):
        kept = words if n >= len(words) else words[: n - 1] + [EOS]
        want = qemb("--output", "base64", records=[{"ids": kept}])
        assert serve.embed([text], truncate_prompt_tokens=n, **right) == want
    # the next request has the server's own limit
    assert serve.embed([text]) == qemb("--output", "base64", records=[{"text": text}])


# ---- keys ----------------------------------------------------------------------------------------


def test_keys_of_other_apis():
    with server() as s:
        want = s.embed(PAIR)
        harmless = {"user": {"any": 1}, "drop_params": True, "timeout": 5, "metadata": []}
        idle = {
            "add_special_tokens": True,
            "late_chunking": False,
            "modality": ["text", "text"],
            "chat_template_kwargs": {},
            "normalize": True,
            "normalized": True,
            "use_activation": True,
            "endianness": "little",
        }
        assert s.embed(PAIR, **harmless, **idle) == want
        assert s.metric("qemb_ignored_keys_total") == 0
        for _ in range(2):
            assert s.embed(PAIR, colour=1, **{"not a name": 2, "k" * 99: 3}) == want
        assert s.embed(PAIR, size=1) == want
        assert s.metric("qemb_ignored_keys_total") == 7
    told = s.of["ignored_key"]
    assert [(e["key"], e["path"]) for e in told] == [
        ("colour", "/v1/embeddings"),
        ("size", "/v1/embeddings"),
    ]
    assert told[0]["request_id"]


@pytest.mark.parametrize(
    "more",
    [
        {"add_special_tokens": False},
        {"late_chunking": True},
        {"return_multivector": True},
        {"messages": [{"role": "user", "content": "x"}]},
        {"chat_template": "x"},
        {"modality": ["text", "image"]},
        {"prompt": "Query: "},
        {"pooling": "mean"},
        {"embedding_types": ["int8"]},
        {"max_tokens": 5},
        {"embd_normalize": -1},
        {"task_type": "RETRIEVAL_QUERY"},
        {"dim": 8},
        {"dims": 8},
        {"query": True},
        {"texts": ["y"]},
        {"text_type": "query"},
        {"prompt_template": "Q: {text}"},
        {"truncate_dim": 8},
        {"dimensionality": 8},
        {"output_dimensionality": 8},
        {"normalize_embeddings": False},
        {"activation": False},
        {"softmax": False},
        {"max_length": 5},
        {"truncation_strategy": "start"},
        {"overflow_strategy": "drop_start"},
        {"long_text_mode": "mean"},
        {"adapter_id": "mine"},
    ],
)
def test_keys_that_would_change_the_vector(serve, more):
    a = serve.post({**OK, **more})
    assert (a.status, a.error["code"]) == (400, "unsupported_parameter")
    assert a.error["param"] == next(iter(more)) and "not served" in a.error["message"]


def test_a_hundred_unknown_keys_are_the_most(serve):
    more = {f"unknown{i}": i for i in range(101)}
    a = serve.post({**OK, **more})
    assert (a.status, a.error["code"], a.error["param"]) == (400, "too_many_keys", "unknown100")
    more.pop("unknown50")
    assert serve.post({**OK, **more}).status == 200


@pytest.mark.parametrize(
    "more",
    [
        {"embed_dtype": "int8"},
        {"output_dtype": "int8"},
        {"embedding_type": "binary"},
        {"encoding_format": "base64"},
        {"output_dimension": 8},
        {"normalize": False},
        {"normalized": False},
        {"use_activation": False},
        {"instruction": "find"},
        {"input_type": "query"},
        {"prompt_name": "query"},
        {"task": "query"},
        {"truncation": False},
        {"truncate_prompt_tokens": 5},
        {"truncation_side": "left"},
        {"truncation_direction": "left"},
        {"fallback": True},
    ],
)
def test_a_key_of_one_path_is_not_ignored_by_another(prompted, more):
    key = next(iter(more))
    served_by_tei = ("normalize", "prompt_name", "truncation_direction")
    for path, body in (("/embed", {"inputs": "x"}), ("/api/embed", {"input": "x"})):
        a = prompted.post({**body, **more}, path=path)
        if path == "/embed" and key in served_by_tei:
            continue
        assert a.status in (400, 422) and "not served" in a.json["error"], (path, a.json)
        assert prompted.post({**body, key: None}, path=path).status == 200


def test_tokenize_takes_the_keys_of_embeddings(prompted):
    def tokens(**more):
        a = prompted.post({"input": "x y", **more}, path="/tokenize")
        return a.json["data"][0]["tokens"] if a.status == 200 else a.error["code"]

    assert tokens() == tokens(prompt_name="query") == tokens(dimensions=8, normalize=False)
    cut = tokens(truncate_prompt_tokens=3, truncation_side="right")
    assert cut == tokens()[:2] + [EOS]
    assert tokens(truncate_prompt_tokens=3) == "invalid_truncation"


@pytest.mark.parametrize("key,value,status,code", [
    ("model", "small", 404, "model_not_found"), ("prompt_name", "query", 400, "invalid_name")])
def test_names_with_nul(prompted, key, value, status, code):
    a = prompted.post({**OK, key: value + "\0more"})
    assert (a.status, a.error["code"], a.error["param"]) == (status, code, key)


@pytest.mark.parametrize(
    "key,right",
    [
        ("inputs", "input"),
        ("imput", "input"),
        ("modle", "model"),
        ("dimension", "dimensions"),
        ("dimesnion", "dimensions"),
        ("inputType", "input_type"),
        ("INPUT_TYPE", "input_type"),
        ("Dimensions", "dimensions"),
        ("encodingFormat", "encoding_format"),
        ("truncatoin", "truncation"),
        ("instructs", "instruct"),
        ("fallbck", "fallback"),
    ],
)
def test_misspelt_keys_are_told_the_right_one(serve, key, right):
    a = serve.post({**OK, key: 1})
    assert (a.status, a.error["code"], a.error["param"]) == (400, "unknown_parameter", key)
    assert f"(want {right}?)" in a.error["message"]
    assert serve.post({**OK, key: None}).status == 200


def test_models_are_optional(serve):
    want = serve.embed(PAIR)
    for more in {}, {"model": None}, {"model": ""}, {"model": "small:latest"}:
        a = serve.post({"input": PAIR, "encoding_format": "base64", **more})
        assert vectors_in(a) == want and a.json["model"] == "small"
    assert serve.post({"input": "x", "model": "small:other"}).status == 404


def test_texts_as_objects(serve):
    assert serve.embed([{"text": t} for t in PAIR]) == serve.embed(PAIR)
    for bad in {"image": "x"}, {"text": 1}, {"text": "x", "image": "y"}, {}:
        assert serve.post({"input": [{"text": "x"}, bad]}).error["code"] == "invalid_type"


# ---- forms of vectors ----------------------------------------------------------------------------


def quantized(unit):
    """int8 and packed signs of vectors, by their definitions."""
    scaled = 127 * unit.astype(np.float64) / np.abs(unit).max(axis=1, keepdims=True)
    return np.rint(scaled).astype(np.int8), np.packbits(unit > 0, axis=1)


@pytest.mark.parametrize("dim", [HIDDEN, 13])
def test_forms_of_vectors(serve, dim):
    unit = floats(TEXTS, dim)
    int8, bits = quantized(unit)
    signed = (bits.astype(np.int16) - 128).astype(np.int8)
    for keys, want in (
        (["float32", "float"], unit),
        (["float16"], unit.astype("<f2")),
        (["int8"], int8),
        (["ubinary"], bits),
        (["binary"], signed),
    ):
        for name in keys:
            for key in "embed_dtype", "output_dtype", "embedding_type":
                a = serve.post({"input": TEXTS, "output_dimension": dim, key: name})
                got = np.array([e["embedding"] for e in a.json["data"]])
                exact = unit if name == "float16" else want  # numbers are not rounded to halves
                assert np.array_equal(got.astype(exact.dtype), exact)
                got = serve.embed(TEXTS, dimensions=dim, **{key: name})
                assert got == [base64.b64encode(v.tobytes()).decode() for v in want]
    for name, want in (("int8", int8), ("ubinary", bits), ("binary", signed)):
        a = serve.post({"input": TEXTS, "dimensions": dim, "encoding_format": name})
        assert [e["embedding"] for e in a.json["data"]] == want.tolist()
    a = serve.post({"input": TEXTS, "dimensions": dim, "embedding_type": "base64"})
    assert vectors_in(a) == [base64.b64encode(v.tobytes()).decode() for v in unit]


def test_forms_that_are_not_served(serve):
    for more in (
        {"encoding_format": "bytes"},
        {"encoding_format": "bytes_only"},
        {"embed_dtype": "bfloat16"},
        {"embed_dtype": "fp8_e4m3"},
        {"embed_dtype": "base64"},
        {"output_dtype": "uint8"},
        {"endianness": "big"},
    ):
        a = serve.post({**OK, **more})
        assert (a.status, a.error["code"]) == (400, "invalid_encoding_format")
        assert next(iter(more.values())) in a.error["message"]
    for more in (
        {"embed_dtype": "int8", "output_dtype": "binary"},
        {"embed_dtype": "binary", "output_dtype": "ubinary"},
        {"encoding_format": "float", "embedding_type": "base64"},
        {"dimensions": 8, "output_dimension": 9},
        {"normalize": True, "normalized": False},
    ):
        assert serve.post({**OK, **more}).error["code"] == "conflicting_parameters"


def test_unscaled_vectors(serve):
    """What the final norm gives: divided by its weights, numbers of mean square 1."""
    model = Qemb(MODEL)
    weights = np.array(model.floats("final_norm"))
    whole = None
    for more in {"normalize": False}, {"normalized": False}, {"use_activation": False}:
        for dim in (HIDDEN, 13):
            got = serve.embed(TEXTS, dimensions=dim, **more)
            raw = np.array([np.frombuffer(base64.b64decode(v), "<f4") for v in got], np.float64)
            whole = raw if whole is None else whole
            assert np.array_equal(raw, whole[:, :dim])
            unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
            # a unit vector is rounded once, to half a unit in the last place of at most 1
            assert np.abs(unit - floats(TEXTS, dim)).max() <= 2**-24
    # ms / (ms + eps) of a row's mean square ms, of which eps = 1e-6 is less than a hundredth
    squares = np.mean((whole / weights) ** 2, axis=1)
    assert (squares > 0.99).all() and (squares < 1.0001).all()
    assert np.abs(np.linalg.norm(whole, axis=1) - 1).min() > 0.1
    a = serve.post({"inputs": TEXTS, "normalize": False}, "/embed")
    assert np.array_equal(np.float32(a.json), whole)


# ---- headers, paths, encodings -------------------------------------------------------------------


@pytest.mark.parametrize(
    "type,status",
    [
        (None, 200),
        ("", 200),
        ("application/x-www-form-urlencoded", 200),
        ("text/json", 200),
        ("application/json;charset=utf8", 200),
        ('application/json; charset="UTF-8"; x=y', 200),
        ("application/json; charset=utf-80", 415),
        ("application/json; charset=latin1", 415),
        ("text/plain", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
def test_types(serve, type, status):
    headers = {} if type is None else {"Content-Type": type}
    assert serve.post(OK, headers=headers).status == status


def test_paths(serve):
    want = serve.post(OK).json
    doubled = "/v1/embeddings/", "//v1/embeddings", "/v1//embeddings//"
    for path in *doubled, "/embeddings", "/embeddings/":
        a = serve.post(OK, path)
        assert a.status == 200 and a.json == want
    for path in "/v1/embeddingsx", "/v1/embedding", "/embeddings/x", "/embed_all", "/predict":
        assert serve.post(OK, path).error["code"] == "unknown_url"
    assert serve.request("GET", "/models").json == serve.request("GET", "/v1/models/").json
    one = serve.request("GET", "/v1/models").json["data"][0]
    more = "//v1//models//small", "/v1/models/small/", "/models/small//"
    for path in "/v1/models/small", "/models/small", *more:
        assert serve.request("GET", path).json == one
    a = serve.request("GET", "/v1/models/other")
    assert a.status == 404 and "small" in a.error["message"]
    a = serve.request("HEAD", "/v1/models/small")
    assert a.status == 200 and not a.body
    with server("--name", "Qwen/Qwen3") as s:
        for path in "/v1/models/Qwen/Qwen3", "/v1/models/Qwen%2FQwen3":
            assert s.request("GET", path).json["id"] == "Qwen/Qwen3"


def test_options_and_origins(serve):
    methods = {"/v1/embeddings": "POST", "/health": "GET, HEAD", "/": "POST", "/x": None}
    for path, allow in methods.items():
        a = serve.request("OPTIONS", path, None, {"Origin": "http://a.example"})
        assert a.status == (204 if allow else 404) and a.headers["Allow"] == allow
        assert not [k for k in a.headers if k.lower().startswith("access-control")]


def test_a_browser_may_be_allowed(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    preflight = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    for origin in "https://a.example", "*":
        with server("--cors-origin", origin, "--api-key-file", keys) as s:
            a = s.request("OPTIONS", "/v1/embeddings", None, preflight)
            assert a.status == 204 and not a.body
            assert a.headers["Access-Control-Allow-Origin"] == origin
            assert a.headers["Access-Control-Allow-Methods"] == "POST"
            asked = preflight["Access-Control-Request-Headers"]
            assert a.headers["Access-Control-Allow-Headers"] == asked
            assert a.headers["Vary"] == (None if origin == "*" else "Origin")
            a = s.post(OK)
            assert a.status == 401 and a.headers["Access-Control-Allow-Origin"] == origin
            a = s.post(OK, headers={**JSON, "Authorization": "Bearer key"})
            assert a.status == 200 and a.headers["Access-Control-Allow-Origin"] == origin
            assert "x-request-id" in a.headers["Access-Control-Expose-Headers"]
            odd = {**preflight, "Access-Control-Request-Headers": "a:b"}
            a = s.request("OPTIONS", "/v1/embeddings", None, odd)
            assert a.headers["Access-Control-Allow-Headers"] is None


def zstd(blocks, window=20, content=b""):
    """A zstd frame (RFC 8878): RLE blocks of 128 KiB of a byte each, then `content` as it is."""
    head = b"\x28\xb5\x2f\xfd\x00" + bytes([(window - 10) << 3])
    rle = ((1 << 17) << 3 | 1 << 1).to_bytes(3, "little")
    last = (len(content) << 3 | 1).to_bytes(3, "little") + content
    return head + b"".join(rle + bytes([b]) for b in blocks) + last


def encoded(s, body, encoding):
    return s.post(body, headers={**JSON, "Content-Encoding": encoding})


BODY = json.dumps(ask(PAIR)).encode()


@pytest.mark.parametrize(
    "encoding,body",
    [
        ("gzip", gzip.compress(BODY)),
        ("x-gzip", gzip.compress(BODY[:9]) + gzip.compress(BODY[9:])),
        ("GZIP", gzip.compress(BODY + b" " * (3 << 20))),
        ("deflate", zlib.compress(BODY)),
        ("zstd", zstd(b"", content=BODY)),
        ("zstd", zstd(b" " * 20, 23, BODY)),
        ("zstd", zstd(b" ") + zstd(b"", content=BODY)),
        ("identity", BODY),
    ],
)
def test_encoded_bodies(serve, encoding, body):
    assert vectors_in(encoded(serve, body, encoding)) == vectors_of(PAIR, MODEL)


@pytest.mark.parametrize(
    "encoding,body,status",
    [
        ("gzip", BODY, 400),
        ("gzip", gzip.compress(BODY)[:-9], 400),
        ("gzip", gzip.compress(BODY) + b"x", 400),
        ("zstd", BODY, 400),
        ("zstd", zstd(b"", content=BODY)[:-1], 400),
        ("zstd", zstd(b"", 24, BODY), 400),  # a window of 16 MiB
        ("gzip", b"", 400),
        ("gzip", gzip.compress(b" " * (100 << 20)), 413),
        ("zstd", zstd(b" " * 10000), 413),
        ("br", BODY, 415),
        ("gzip, gzip", BODY, 415),
    ],
)
def test_damaged_and_endless_bodies(serve, encoding, body, status):
    a = encoded(serve, body, encoding)
    assert a.status == status
    assert serve.post(OK).status == 200


@pytest.mark.parametrize(
    "encoding,body,why",
    [
        ("zstd", zstd(b"", 24, BODY), "window is too large (want at most 8 MiB)"),
        ("zstd", zstd(b"", content=BODY)[:-1], "cut off"),
        ("gzip", gzip.compress(BODY)[:-9], "cut off"),
        ("gzip", BODY, "incorrect header"),
    ],
)
def test_damaged_bodies_tell_why(serve, encoding, body, why):
    assert why in encoded(serve, body, encoding).error["message"]


def test_the_limit_is_of_the_decoded_body():
    with server("--max-body", 1) as s:
        for n, status in (1023, 200), (1024, 200), (1025, 413):
            body = BODY + b" " * (n - len(BODY))
            small = gzip.compress(body), "gzip"
            for data, encoding in (body, "identity"), small, (zstd(b"", content=body), "zstd"):
                # where zstd's frame is larger than what it holds, it is the body that is too large
                want = 413 if len(data) > 1024 else status
                assert encoded(s, data, encoding).status == want
            assert len(small[0]) < 1024


def test_decoders_count_as_memory():
    """A body in work leaves no room for a second decoder within 1 MiB."""

    def one_beside_others(s):
        c = s.connect()
        c.putrequest("POST", "/v1/embeddings")
        c.putheader("Content-Length", str(len(BODY)))
        c.endheaders(BODY[:10])
        others = [encoded(s, zstd(b"", content=BODY), "zstd").status for _ in range(50)]
        c.send(BODY[10:])
        one = c.getresponse().status
        c.close()
        return one, others

    guard = time.monotonic() + GUARD
    with server("--max-memory", 1) as s:
        # it is refused itself if its first bytes meet a decoder of the others
        while (got := one_beside_others(s))[0] == 429:
            assert time.monotonic() < guard
        one, others = got
        assert one == 200 and set(others) <= {200, 429} and others[-1] == 429
        # the memory is free a moment after the response has been sent
        while (status := encoded(s, zstd(b"", content=BODY), "zstd").status) == 429:
            assert time.monotonic() < guard
        assert status == 200


# ---- text-embeddings-inference -------------------------------------------------------------------


def test_tei(serve):
    unit = floats(PAIR)
    for path in "/embed", "/embed/", "/":
        for inputs, want in ((PAIR, unit), (PAIR[0], unit[:1])):
            a = serve.post({"inputs": inputs, "truncate": True, "normalize": True}, path)
            assert a.status == 200 and np.array_equal(np.float32(a.json), want)
    a = serve.post({"inputs": PAIR, "dimensions": 7, "truncation_direction": "right"}, "/embed")
    assert np.array_equal(np.float32(a.json), floats(PAIR, 7))
    ids = [json.loads(l) for l in qemb("tokenize", records=[{"text": t} for t in PAIR])]
    assert np.array_equal(np.float32(serve.post({"inputs": ids}, "/embed").json), unit)
    a = serve.post({"inputs": PAIR, "prompt_name": "query"}, "/embed")
    query = qemb("--query", records=[{"text": t} for t in PAIR])
    assert np.array_equal(np.float32(a.json), np.float32([json.loads(l) for l in query]))
    assert serve.request("GET", "/embed").headers["Allow"] == "POST"


@pytest.mark.parametrize(
    "body,status,error_type",
    [
        ({}, 422, "Validation"),
        (b"{", 422, "Validation"),
        ({"inputs": []}, 400, "Empty"),
        ({"inputs": {"source_sentence": "a", "sentences": ["b"]}}, 422, "Validation"),
        ({"inputs": LONG_TEXT}, 422, "Validation"),
        ({"inputs": [[1, 2]]}, 422, "Validation"),
        ({"inputs": "x", "truncation_direction": "Left"}, 422, "Validation"),
        ({"inputs": "x", "prompt_name": "passage"}, 422, "Validation"),
        ({"inputs": "x", "normalize": 1}, 422, "Validation"),
        ({"inputs": "x", "encoding_format": "base64"}, 422, "Validation"),
        ({"inputs": "x", "truncat": True}, 422, "Validation"),
        ({"inputs": "x", "model": "other"}, 404, "Validation"),
        ({"inputs": ["x"] * 2049}, 422, "Validation"),
    ],
)
def test_errors_of_tei(serve, body, status, error_type):
    a = serve.post(body, "/embed")
    assert (a.status, a.json["error_type"]) == (status, error_type) and a.json["error"]
    assert set(a.json) == {"error", "error_type"}


def test_info_of_tei():
    with server("--truncate", "--max-texts", 32, "--max-tokens", 100) as s:
        info = s.request("GET", "/info").json
        assert info["model_id"] == "small" and info["model_dtype"] == "float32"
        assert info["model_type"] == {"embedding": {"pooling": "last_token"}}
        assert info["max_client_batch_size"] == 32 and info["max_input_length"] == 100
        assert info["auto_truncate"] is True and info["max_batch_tokens"] == 1024
        assert info["tokenization_workers"] == 2 and info["version"]
        assert info["max_concurrent_requests"] > 0
    reranker = str(ROOT / "tests" / "fixtures" / "reranker.qemb")
    with server("--math", "int8", model=reranker) as s:
        info = s.request("GET", "/info").json
        assert list(info["model_type"]) == ["reranker"] and info["model_dtype"] == "int8"
        a = s.post({"inputs": "x"}, "/embed")
        assert (a.status, a.json["error_type"]) == (422, "Validation")
        a = s.post({"input": "x"}, "/api/embed")
        assert a.status == 400 and "embedding model" in a.json["error"]


# ---- Ollama --------------------------------------------------------------------------------------


def test_ollama(serve):
    unit = floats(PAIR)
    tokens = [json.loads(l) for l in qemb("tokenize", records=[{"text": t} for t in PAIR])]
    more = {"options": {}, "keep_alive": -1}
    for inputs, n in ((PAIR, 2), (PAIR[0], 1)):
        for model in "small", "small:latest":
            a = serve.post({"model": model, "input": inputs, **more}, "/api/embed")
            assert a.status == 200 and np.array_equal(np.float32(a.json["embeddings"]), unit[:n])
            assert a.json["model"] == "small" and a.json["total_duration"] > 0
            assert a.json["load_duration"] == 0
            assert a.json["prompt_eval_count"] == sum(map(len, tokens[:n]))
    old = {"model": "small", "prompt": PAIR[0], "options": {"mirostat": 0}}
    a = serve.post(old, "/api/embeddings")
    assert list(a.json) == ["embedding"]
    assert np.array_equal(np.float32(a.json["embedding"]), unit[0])
    a = serve.post({"model": "small", "input": PAIR, "dimensions": 5}, "/api/embed")
    assert np.array_equal(np.float32(a.json["embeddings"]), floats(PAIR, 5))


def test_ollama_cuts_long_texts(serve):
    cut = np.float32(json.loads(qemb("--truncate", records=[{"text": LONG_TEXT}])[0]))
    for more in {}, {"truncate": True}, {"truncate": None}, {"options": {"num_ctx": 10**6}}:
        a = serve.post({"model": "small", "input": LONG_TEXT, **more}, "/api/embed")
        assert np.array_equal(np.float32(a.json["embeddings"][0]), cut)
    a = serve.post({"model": "small", "prompt": LONG_TEXT}, "/api/embeddings")
    assert np.array_equal(np.float32(a.json["embedding"]), cut)
    words = json.loads(qemb("tokenize", records=[{"text": PAIR[0]}])[0])
    want = qemb("--output", "json", records=[{"ids": words[:2] + [EOS]}])
    a = serve.post({"input": PAIR[0], "options": {"num_ctx": 3}}, "/api/embed")
    assert np.array_equal(np.float32(a.json["embeddings"][0]), np.float32(json.loads(want[0])))


def test_errors_of_ollama(serve):
    for body, path, status, word in (
        ({"model": "small", "input": LONG_TEXT, "truncate": False}, "/api/embed", 400, "too long"),
        ({"model": "other", "input": "x"}, "/api/embed", 404, "small"),
        ({"model": "small"}, "/api/embed", 400, "input"),
        ({"model": "small", "input": [1, 2]}, "/api/embed", 400, "token ids"),
        ({"model": "small", "input": "x", "options": 1}, "/api/embed", 400, "options"),
        ({"input": "x", "options": {"num_ctx": 0}}, "/api/embed", 400, "num_ctx"),
        ({"model": "small", "prompt": ["x"]}, "/api/embeddings", 400, "prompt"),
        (b"{", "/api/embed", 400, "JSON"),
        ({"model": "other"}, "/api/show", 404, "small"),
    ):
        a = serve.post(body, path)
        assert a.status == status and list(a.json) == ["error"] and word in a.json["error"]


def test_models_of_ollama(serve):
    a = serve.request("GET", "/api/tags")
    (model,) = a.json["models"]
    data = open(MODEL, "rb").read()
    assert model["name"] == model["model"] == "small" and model["size"] == len(data)
    assert model["digest"] == hashlib.sha256(data[4096:]).hexdigest()
    # 689,792 in the layers, of which the norms' are left out, 327,680 in the embedding table
    assert model["details"]["parameter_size"] == "1.0M"
    assert model["details"]["quantization_level"] == "F16"
    assert serve.request("GET", "/api/version").json["version"].count(".") == 2
    for body in {"model": "small:latest"}, {"name": "small", "verbose": True}:
        shown = serve.post(body, "/api/show").json
        assert shown["capabilities"] == ["embedding"]
        assert shown["model_info"]["qwen3.embedding_length"] == HIDDEN
        assert shown["model_info"]["qwen3.context_length"] == MAX_TOKENS
        assert shown["details"] == model["details"]


# ---- fingerprints, traces, metrics ---------------------------------------------------------------


def recipe_of(model, table, prompt):
    header = open(model, "rb").read(4096)
    own = hashlib.sha256(table.encode() + b"\0" + header).digest()
    return hashlib.sha256(own + prompt.encode()).hexdigest()[:32]


def test_answers_carry_the_recipe():
    reranker = str(ROOT / "tests" / "fixtures" / "reranker.qemb")
    prompt = Qemb(MODEL).prompts["query"]
    with server("--cpu", "plain", "--query", "--reranker", reranker, "--fallback", TINY) as s:
        s.wait_log("ready", 3)
        table = s.wait_log("loaded")["table"]
        task = "Instruct: Find\nQuery:"
        for more, model, want in (
            ({}, MODEL, prompt),
            ({"instruct": ""}, MODEL, ""),
            ({"instruct": "Find"}, MODEL, task),
            ({"input_type": "document"}, MODEL, ""),
            ({"model": "hf-tiny", "instruct": "Find"}, TINY, task),
        ):
            a = s.post(ask(["x"], **more))
            recipe = recipe_of(model, table, want)
            assert a.headers["x-qemb-fingerprint"] == a.json["system_fingerprint"] == recipe
        a = s.post({"input": [[1, EOS]]})
        assert a.headers["x-qemb-fingerprint"] == recipe_of(MODEL, table, "")
        a = s.post({"inputs": "x"}, "/embed")
        assert a.headers["x-qemb-fingerprint"] == recipe_of(MODEL, table, prompt)
        a = s.post({"input": "x"}, "/api/embed")
        assert a.headers["x-qemb-fingerprint"] == recipe_of(MODEL, table, prompt)
        a = s.post({"query": "q", "documents": ["d"], "instruct": "T"}, "/v1/rerank")
        assert a.headers["x-qemb-fingerprint"] == recipe_of(reranker, table, "T")
        for a in s.post({"input": "x"}, "/tokenize"), s.post(b"{"), s.request("GET", "/health"):
            assert a.headers["x-qemb-fingerprint"] is None


TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_traces_are_in_the_log():
    good = [f"00-{TRACE}-{SPAN}-01", f"01-{TRACE}-{SPAN}-00", f"cc-{TRACE}-{SPAN}-01-more"]
    bad = [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-0",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00-{TRACE}-{SPAN}0-01",
        f"0-{TRACE}-{SPAN}-01",
    ]
    with server() as s:
        for i, header in enumerate([*good, *bad, None]):
            more = {} if header is None else {"traceparent": header}
            assert s.post(OK, headers={**JSON, "x-request-id": str(i), **more}).status == 200
        s.wait_log("request", len(good) + len(bad) + 1)
        lines = {e["request_id"]: e for e in s.of["request"]}
    for i in range(len(good) + len(bad) + 1):
        told = lines[str(i)].get("trace_id"), lines[str(i)].get("span_id")
        assert told == ((TRACE, SPAN) if i < len(good) else (None, None)), i


def test_metrics_by_path():
    with server() as s:
        s.post({"inputs": "x"}, "/")
        s.post({"input": "x"}, "//api/embed/")
        s.post({"prompt": "x"}, "/api/embeddings")
        s.post({}, "/api/show")
        for path in "/info", "/api/tags", "/api/version", "/models/small", "/v1/models/other":
            s.request("GET", path)
        s.request("OPTIONS", "/embeddings")
        s.wait_metric("qemb_texts_total", lambda x: x == 3)
        s.wait_metric("qemb_request_seconds_count", lambda x: x == 3)
        counted = {
            (labels["path"], labels["code"])
            for (name, pairs), _ in s.metrics().items()
            if name == "qemb_requests_total" and (labels := dict(pairs))
        }
    assert counted >= {
        ("/embed", "200"),
        ("/api/embed", "200"),
        ("/api/embeddings", "200"),
        ("/api/show", "200"),
        ("/info", "200"),
        ("/api/tags", "200"),
        ("/api/version", "200"),
        ("/v1/models/{id}", "200"),
        ("/v1/models/{id}", "404"),
        ("/v1/embeddings", "204"),
    }
