"""JSON from hostile hands: NUL in names and behind numbers, ids byte for byte, lone surrogates, and
memory that is refused while a record or a body is read."""
import json
import os
import subprocess

import pytest
from helpers import GUARD, QEMB, SMALL, is_sanitized, stdout_of
from serve_client import server

RERANKER = SMALL.replace("small.qemb", "reranker.qemb")
EMBED = ("-m", SMALL, "--dim", "2", "--input", "jsonl", "--output", "jsonl")


def qemb(*args, data, env=None):
    return subprocess.run([QEMB, *args], input=data, capture_output=True, timeout=GUARD, env=env)


# ---- the pipe ----------------------------------------------------------------------------------

IDS = [b"0.1", b"1.10", b"-0.0", b"1E5", b"1e400", b"18446744073709551616",
       b"123456789012345678.90", rb'"\u0041\/\ud83d\ude00"', '"\u007f\u0085"'.encode(),
       b'[ 1 ,{"id": 2.50} ]', b"null"]


@pytest.mark.parametrize("args, body", [
    (EMBED, b'"text":"a"'), (EMBED, b'"text":7'), (EMBED + ("--keep",), b'"text":"a","x":0.10'),
    (("rerank", "-m", RERANKER), b'"query":"a","documents":["b"]'),
    (("tokenize", "-m", SMALL, "--input", "jsonl"), b'"text":7')])
def test_an_id_comes_back_as_it_came(args, body):
    data = b"".join(b'{"id":%s,%s}\n{%s, "id" : %s }\n' % (i, body, body, i) for i in IDS)
    p = qemb(*args, data=data)
    assert p.returncode == (3 if b"7" in body else 0), p.stderr
    lines = p.stdout.splitlines()
    assert len(lines) == 2 * len(IDS)
    for line, i in zip(lines, [i for i in IDS for _ in range(2)]):
        assert line.startswith(b'{"id":' + i + b","), line


def test_nul_behind_a_number_is_no_json():
    good = b'{"id":7,"ids":[1,2]}\n'
    for bad in (b'{"id":1,"ids":[1\0,2]}', b'{"id":1.5\0,"text":"a"}', b'{"dim":2\0,"text":"a"}',
                b'{"text":"a","id":1\0}', b'{"text":"a"}\0', b'{"text\\u0000":"a"}'):
        got = [json.loads(x) for x in stdout_of(qemb(*EMBED, data=good + bad + b"\n" + good),
                                               status=3, errors="1 of 3").splitlines()]
        assert got[1]["error"]["code"] == "invalid_json" and got[1]["id"] is None
        assert got[0]["id"] == got[2]["id"] == 7 and "embedding" in got[2]


def test_a_lone_surrogate_names_its_text():
    data = b"""{"query":"a","documents":["b","c",{"text":"\\udc00"}]}
{"query":"\\ud800","documents":[]}
"""
    lines = stdout_of(qemb("rerank", "-m", RERANKER, data=data), status=3, errors="2 records")
    said = [json.loads(x)["error"]["message"] for x in lines.splitlines()]
    assert "documents[2]: a lone surrogate" in said[0] and "query: a lone surrogate" in said[1]


# ---- the server --------------------------------------------------------------------------------

def test_names_are_compared_to_their_end():
    ok = {"model": "small", "input": "a"}
    with server() as s:
        assert s.post(ok).status == 200
        for key, value, status in (
                ("model", "small\0other", 404), ("model", "small\0", 404), ("model", "\0", 404),
                ("encoding_format", "float\0x", 400), ("embed_dtype", "int8\0", 400),
                ("endianness", "little\0", 400), ("truncate", "END\0", 400),
                ("truncation_side", "right\0", 400), ("prompt_name", "query\0", 400),
                ("input_type", "query\0", 400)):
            got = s.post({**ok, key: value})
            assert got.status == status and got.json["error"]["param"] == key, (key, got.body)
        got = s.post({"inputs": "a", "encoding_format": "float\0"}, "/embed")
        assert got.status == 422, got.body
    with server(model=RERANKER) as s:
        for name, status in (("text", 200), ("text\0", 400)):
            body = {"query": "a", "documents": ["b"], "rank_fields": [name]}
            assert s.post(body, "/v1/rerank").status == status


def test_integers_in_any_form():
    with server("--allow-token-ids") as s:
        want = s.post({"input": "a", "dimensions": 64}).json["data"]
        for number in (b"64.0", b"6.4e1", b"640e-1", b"64"):
            got = s.post(b'{"input":"a","dimensions":%s}' % number)
            assert got.status == 200 and got.json["data"] == want
        want = s.post({"input": [[1, 2]]}).json["data"]
        assert s.post(b'{"input":[[1.0,2e0]]}').json["data"] == want
        for number in (b"64.5", b"1e30", b"-1.0", b"0.0", b"1e400"):
            assert s.post(b'{"input":"a","dimensions":%s}' % number).status == 400
    with server(model=RERANKER) as s:
        got = s.post(b'{"query":"a","documents":["b","c"],"top_n":1.0}', "/v1/rerank")
        assert got.status == 200 and len(got.json["results"]) == 1


def test_an_error_names_the_text():
    with server() as s:
        for body, says in ((b'{"input":["a","b\\ud83d"]}', "input[1]: a lone surrogate"),
                           (b'{"input":[{"text":"a"},{"text":"\xff"}]}', "input[1]: invalid UTF-8"),
                           (b'{"input":"\\ude00"}', "input: a lone surrogate"),
                           (b'{"input":[1\0]}', "(got 0x00, want , or ])")):
            got = s.post(body)
            assert got.status == 400 and says in got.json["error"]["message"], got.body


# ---- memory that is refused --------------------------------------------------------------------

# Refuses allocations of REFUSE_FROM bytes and more: jansson's own, or those of the program.
REFUSE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
static size_t from = (size_t)-1;
static int refused(size_t n) { return n >= from ? errno = ENOMEM : 0; }
#ifdef OF_JANSSON
static void *limited(size_t n) { return refused(n) ? NULL : malloc(n); }
#else
void *__libc_malloc(size_t); void *__libc_realloc(void *, size_t);
void *malloc(size_t n) { return refused(n) ? NULL : __libc_malloc(n); }
void *realloc(void *p, size_t n) { return refused(n) ? NULL : __libc_realloc(p, n); }
#endif
__attribute__((constructor)) static void start(void) {
    from = strtoull(getenv("REFUSE_FROM"), NULL, 10);
#ifdef OF_JANSSON
    void (*set)(void *(*)(size_t), void (*)(void *)) = dlsym(RTLD_DEFAULT, "json_set_alloc_funcs");
    set(limited, free);
#endif
}
"""


@pytest.fixture(scope="module", params=["jansson", "program"])
def refuse(request, tmp_path_factory):
    """Returns the environment in which allocations of so many bytes and more are refused."""
    if is_sanitized(QEMB):
        pytest.skip("the sanitizer has an allocator of its own")
    folder = tmp_path_factory.mktemp("refuse")
    (folder / "refuse.c").write_text(REFUSE)
    define = ["-DOF_JANSSON"] if request.param == "jansson" else []
    subprocess.run(["cc", "-shared", "-fPIC", *define, folder / "refuse.c", "-o",
                    folder / "refuse.so", "-ldl"], check=True)
    return request.param, lambda n: {**os.environ, "LD_PRELOAD": str(folder / "refuse.so"),
                                     "REFUSE_FROM": str(n)}


LONG = [b'{"id":1,"text":"%s"}' % (b"ab c " * 800000), b'{"id":1,"text":"%s"}' % (b"\\n" * 1500000),
        b'{"id":1,"ids":[%s1]}' % (b"1," * 400000), b'{"id":"%s","text":7}' % (b"i" * 3000000),
        b'{"id":%s1,"text":7}' % (b"1" * 3000000), b'{"%s":1}' % (b"k" * 3000000)]


@pytest.mark.parametrize("n", [16, 100, 2000, 300000, 2500000])
def test_a_record_without_memory_costs_itself_alone(refuse, n):
    what, environment = refuse
    if what == "program" and n < 2500000:
        pytest.skip("the model itself needs more")
    short = b'{"id":7,"text":"a"}'
    data = b"\n".join(x for line in LONG for x in (line, short))
    p = qemb("-m", SMALL, "--truncate", "--dim", "2", "--input", "jsonl", "--output", "jsonl",
             data=data, env=environment(n))
    assert p.returncode == 3, p.stderr
    got = [json.loads(x, parse_int=str) for x in p.stdout.splitlines()]
    assert len(got) == 2 * len(LONG)
    codes = [g["error"]["code"] if "error" in g else None for g in got]
    assert "out_of_memory" in codes[::2] and set(codes[::2]) <= {
        "out_of_memory", "bad_record", None}
    assert set(codes[1::2]) == ({"out_of_memory"} if n < 200 else {None})


def test_a_request_without_memory_costs_itself_alone(refuse, monkeypatch):
    _, environment = refuse
    for name, value in environment(2500000).items():
        monkeypatch.setenv(name, value)
    body = b'{"truncate":true,"input":["%s"]}' % (b"ab c " * 600000)
    with server() as s:
        want = s.post({"input": "a"})
        assert want.status == 200
        for _ in range(3):
            got = s.post(body)
            assert got.status == 503 and got.json["error"]["code"] == "out_of_memory", got.body
            assert s.post({"input": "a"}).json["data"] == want.json["data"]
