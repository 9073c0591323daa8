"""qemb-serve's HTTP layer by raw sockets: malformed requests, half-closed and slow clients, too
many connections, connections that stay open, and that the server says how it is whatever it
does."""
import contextlib
import json
import re
import resource
import shutil
import socket
import subprocess
import threading
import time

import pytest
from helpers import wait_for
from serve_client import (
    BUSY,
    GUARD,
    JSON,
    OK,
    SERVE,
    Slow,
    ask,
    is_closed,
    readable,
    serve,  # noqa: F401 - a fixture
    server,
    slow_request,
)

BODY = json.dumps(OK).encode()


def connect(s, data=b"", host="127.0.0.1", window=None):
    k = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if window:
        k.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    k.settimeout(GUARD)
    k.connect((host, s.port))
    k.sendall(data)
    return k


def head(length, path="/v1/embeddings", more=""):
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def post(body=BODY, more="", path="/v1/embeddings"):
    return head(len(body), path, more) + body


def get(path="/health", more=""):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode()


def to_end(k):
    """Everything that the server sends until it closes the connection."""
    got = b""
    with k:
        while chunk := k.recv(65536):
            got += chunk
    return got


class Response:
    """A response and what follows it."""

    def __init__(self, data):
        first, _, rest = data.partition(b"\r\n\r\n")
        line, *fields = first.decode().split("\r\n")
        self.status = int(re.fullmatch(r"HTTP/1\.1 (\d{3}) .*", line)[1])
        self.headers = {k.lower(): v for k, v in (f.split(": ", 1) for f in fields)}
        length = int(self.headers.get("content-length", 0))
        self.body, self.rest = rest[:length], rest[length:]


def one(k):
    """The response on a connection that stays open."""
    got = b""
    while b"\r\n\r\n" not in got or len(Response(got).body) < int(
            Response(got).headers["content-length"]):
        chunk = k.recv(65536)
        assert chunk, got
        got += chunk
    return Response(got)


def wait(good):
    wait_for(good, GUARD, 0.02)


# ---- malformed requests --------------------------------------------------------------------------

LINE = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n"
CHUNKS = "2b\r\n" + '{"model":"small","input":"x","dimensions":1}'[:43] + "\r\n0\r\n\r\n"

MALFORMED = [
    # two lengths, two framings, no length
    (LINE + "Content-Length: 27\r\nContent-Length: 5\r\n\r\n" + BODY.decode(), 400),
    (LINE + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS
     + get(more="Connection: close\r\n").decode(), 400),
    (LINE + "Content-Length: +5\r\n\r\nhello", 400),
    (LINE + "Content-Length: 5, 5\r\n\r\nhello", 400),
    (LINE + "Content-Length: -1\r\n\r\n", 400),
    (LINE + "Transfer-Encoding : chunked\r\n\r\n" + CHUNKS, 400),
    (LINE + "Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS, 400),
    (LINE + "Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS, 501),
    # lines
    ("GET /health HTTP/1.1\nHost: x\n\n", 400),
    ("GET /health HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n", 400),
    ("GET /health HTTP/1.1\r\nHost: x\r\nX: \0\r\n\r\n", 400),
    ("GET /health HTTP/1.1\r\nHost: x\r\nX: \x1b[2J\r\n\r\n", 400),
    ("GET /health HTTP/1.1\r\n\r\n", 400),
    ("GET /health\r\n\r\n", 400),
    ("\x16\x03\x01\x02\x00\x01\x00", 400),
    # targets
    ("GET /health%00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET /%00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET %00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("GET /health%0d%0aX:%20y HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    # chunks
    (LINE + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    (LINE + "Transfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n", 400),
    (LINE + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello!", 400),
    (LINE + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n", 400),
    # limits
    ("GET /" + "a" * 9000 + " HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    ("GET /" + "a" * 9000, 414),
    ("GET / HTTP/1.1\r\nHost: x\r\nX: " + "a" * 40000, 431),
    ("GET / HTTP/1.1\r\nHost: x\r\n" + "X: a\r\n" * 200 + "\r\n", 431),
    ("GET / HTTP/9.9\r\nHost: x\r\n\r\n", 505),
    ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    (LINE + "Expect: more\r\nContent-Length: 5\r\n\r\n", 417),
]


def test_malformed_requests_get_one_response_each(serve):  # noqa: F811
    """In JSON, with a request id, counted and logged; then the connection is closed, and what else
    it has sent is no request."""
    counted = lambda: sum(v for (name, labels), v in serve.metrics().items()
                          if name == "qemb_requests_total"
                          and dict(labels)["code"] in ("400", "414", "417", "431", "501", "505"))
    before, ids = counted(), {}
    for data, status in MALFORMED:
        # a client that is told the end early may still be sending
        with contextlib.suppress(ConnectionError):
            k = connect(serve)
            k.sendall(data.encode("latin-1"))
        got = to_end(k)
        a, heads = Response(got), len(re.findall(rb"HTTP/1\.1 \d+ ", got))
        assert (a.status, heads, a.rest) == (status, 1, b""), (data, got)
        error = json.loads(a.body)["error"]
        assert error["message"] and error["code"] and a.headers["connection"] == "close"
        assert a.headers["content-type"] == "application/json"
        ids[a.headers["x-request-id"]] = status
    assert len(ids) == len(MALFORMED) and len(serve.embed(["still there"])) == 1
    wait(lambda: {e["request_id"] for e in serve.of["request"]} >= {*ids})
    said = {e["request_id"]: e["status"] for e in serve.of["request"]}
    assert {i: said[i] for i in ids} == ids
    assert counted() - before == len(MALFORMED)


def test_malformed_requests_in_the_form_of_their_api(serve):  # noqa: F811
    for path, keys in ("/embed", {"error", "error_type"}), ("/api/embed", {"error"}):
        a = Response(to_end(connect(serve, head("5x", path, "x-request-id: mine\r\n"))))
        assert a.status == 400 and json.loads(a.body).keys() == keys
        assert a.headers["x-request-id"] == "mine"
    a = Response(to_end(connect(serve, b"HEAD /health HTTP/1.1\r\n\r\n")))
    assert a.status == 400 and a.body == b"" and int(a.headers["content-length"]) > 0


def test_well_formed_requests(serve):  # noqa: F811
    """What a strict reader has to take: chunks with extensions and fields behind them, an empty
    line before a request, also in two pieces, an absolute target, HTTP/1.0, and a body in any
    pieces."""
    chunked = LINE + "Transfer-Encoding: Chunked\r\n\r\n"
    pieces = "".join(f"{1:x};a=\"b\"\r\n{c}\r\n" for c in BODY.decode())
    k = connect(serve, (chunked + pieces + "0\r\nX-Check: y\r\n\r\n").encode())
    assert one(k).status == 200
    k.sendall(b"\r\n" + get())
    assert one(k).status == 200
    for piece in b"\r", b"\n", get():
        k.sendall(piece)
        time.sleep(0.05)  # usually read apart; together they are as good
    assert one(k).status == 200
    k.sendall(b"GET http://x/health?a=%20 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert one(k).status == 200
    for i in range(0, len(post()), 7):
        k.sendall(post()[i:i + 7])
        time.sleep(0.001)
    assert one(k).status == 200
    k.close()
    a = Response(to_end(connect(serve, b"GET /health HTTP/1.0\r\n\r\n")))
    assert a.status == 200 and a.headers["connection"] == "close"


def test_pipelined_requests_of_all_kinds(serve):  # noqa: F811
    data = post() + get() + get("/nowhere") + post(b"{") + get(more="Connection: close\r\n") + get()
    rest, statuses = to_end(connect(serve, data)), []
    while rest:
        a = Response(rest)
        rest = a.rest
        statuses.append(a.status)
    assert statuses == [200, 200, 404, 400, 200]


def test_expect(serve):  # noqa: F811
    k = connect(serve, head(len(BODY), more="Expect: 100-continue\r\n"))
    assert k.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    k.sendall(BODY)
    assert one(k).status == 200
    k.close()
    for data, status in (
        (head(1 << 40, more="Expect: 100-continue\r\n"), 413),
        (head(5 << 20, more="Expect: 100-continue\r\n"), 413),
        (head(5, "/nowhere", "Expect: 100-continue\r\n"), 404),
        (head(5, more="Expect: 100-continue\r\nContent-Type: text/plain\r\n"), 415),
    ):
        assert Response(to_end(connect(serve, data))).status == status
    k = connect(serve, post(more="Expect: 100-continue\r\n"))  # the body is there already
    assert one(k).status == 200
    k.close()


def test_spaces_before_the_key(tmp_path):
    (tmp_path / "keys").write_text("key\n")
    with server("--api-key-file", tmp_path / "keys") as s:
        for value, status in ("Bearer  key", 200), ("bearer \t key \t", 200), ("Bearerkey", 401):
            assert s.post(OK, headers={**JSON, "Authorization": value}).status == status


# ---- connections that stay open ------------------------------------------------------------------


def test_idle_connections():
    """They are closed after the time that responses announce, not before."""
    with server("--keep-alive", 1, "--receive-timeout", 600) as s:
        k = connect(s, get())
        a = one(k)
        assert a.headers["connection"] == "keep-alive"
        assert a.headers["keep-alive"] == "timeout=1"
        start = time.monotonic()
        assert k.recv(1) == b"" and time.monotonic() - start > 1
        k.close()
        k = connect(s, b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert one(k).headers["connection"] == "keep-alive"
        k.sendall(get())
        assert one(k).status == 200
        k.close()
        assert s.metric("qemb_reaped_total") == 0
    with server() as s:
        k = connect(s, get())
        assert one(k).headers["keep-alive"] == "timeout=75"
        k.close()


def test_clients_that_stop_sending_are_answered():
    """A client may shut down its sending half when it has sent all: it gets its response, whether
    it takes long or not. One that has closed its socket is dropped."""
    with server(*BUSY) as s:
        s.embed(["x"])
        slow = Slow(s)
        s.wait_metric("qemb_queue_tokens", lambda x: x > 0)
        half = []
        for body in ask(["not in the cache"]), ask(["x"]), slow_request(2, 500), {"input": 3}:
            half.append(connect(s, post(json.dumps(body).encode()) + get()))
            half[-1].shutdown(socket.SHUT_WR)
        gone = connect(s, post(json.dumps(slow_request(2, 900)).encode()))
        gone.close()
        s.wait_metric("qemb_departed_total", lambda x: x == 1)
        for k, status in zip(half, (200, 200, 200, 400), strict=True):
            first = Response(to_end(k))
            assert first.status == status and len(json.loads(first.body)) > 0
            assert Response(first.rest).status == 200  # of the second request on the connection
        assert slow.wait().status == 200
        assert s.metric("qemb_departed_total") == 1
        wait(lambda: [e["status"] for e in s.of["request"]].count(499) == 1)


def test_all_addresses_of_a_name(tmp_path):
    """--host localhost listens at 127.0.0.1 and at ::1, on one port, and passes over addresses that
    the machine does not have."""
    (tmp_path / "hosts").write_text("127.0.0.1 here\n::1 here\n2001:db8::1 here\n127.0.0.1 there\n"
                                    "192.0.2.1 there\n")
    mount = ["unshare", "-rm", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"',
             str(tmp_path / "hosts")]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], check=False).returncode:
        pytest.skip("unshare: not permitted")
    families = {f for f, *_ in socket.getaddrinfo("::1", 0, type=socket.SOCK_STREAM)}
    assert families == {socket.AF_INET6}
    script = tmp_path / "serve"
    script.write_text(f"#!/bin/sh\nexec {' '.join(map(repr, mount))} {SERVE} \"$@\"\n")
    script.chmod(0o755)
    for host, addresses in ("here", ("127.0.0.1", "::1")), ("there", ("127.0.0.1",)):
        with server("--host", host, program=str(script)) as s:
            for address in addresses:
                assert Response(to_end(connect(s, get(more="Connection: close\r\n"),
                                               address))).status == 200
            assert s.metric("qemb_healthy") == 1


# ---- slow clients --------------------------------------------------------------------------------


def test_steady_clients_are_not_cut_off():
    """Longer than the time-out, they send and read: each progress starts the clock again."""
    with server("--receive-timeout", 1) as s:
        body = json.dumps({"model": "small", "input": ["x"] * 2000}).encode()
        k = connect(s, window=65536)
        data = head(len(body)) + body
        for i in range(30):  # three seconds, and more than 1024 bytes in each
            k.sendall(data[i * len(data) // 30:(i + 1) * len(data) // 30])
            time.sleep(0.1)
        got = k.recv(65536)
        length = int(Response(got).headers["content-length"])
        want = length + got.index(b"\r\n\r\n") + 4
        n = len(got)
        while n < want:
            time.sleep(0.25 * 65536 / 262144)
            chunk = k.recv(65536)
            assert chunk, f"cut off after {n} of {want} bytes"
            n += len(chunk)
        k.close()
        assert length > 2e6 and s.metric("qemb_reaped_total") == 0


def drip(k, stop):
    """Sends a byte now and then."""
    with contextlib.suppress(OSError):
        while not stop.wait(0.2):
            k.send(b"x")


def test_clients_that_drip_are_cut_off():
    """A byte now and then is progress, but less than a client may take its time with."""
    with server("--receive-timeout", 1) as s:
        stop = threading.Event()
        slow = [connect(s, d) for d in (b"GET /", get()[:-2] + b"X: ", head(100000), LINE.encode()
                                        + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n")]
        reader = connect(s, post(json.dumps({"input": ["x"] * 2000}).encode()), window=4096)
        threads = [threading.Thread(target=drip, args=(k, stop)) for k in slow]
        for t in threads:
            t.start()

        def all_closed():
            with contextlib.suppress(OSError):
                reader.recv(10)
            return s.metric("qemb_reaped_total") == 5

        wait(all_closed)
        stop.set()
        for t in threads:
            t.join()
        wait(lambda: all(is_closed(k) for k in slow))
        for k in [*slow, reader]:
            k.close()


def test_clients_that_do_not_read_give_back_their_memory():
    """Long before the time-out, when others need it."""
    with server("--max-memory", 8) as s:
        body = post(json.dumps({"input": ["x"] * 1000}).encode())
        lazy = [connect(s, body, window=4096) for _ in range(12)]
        s.wait_metric("qemb_reaped_total", lambda x: x > 0)
        wait(lambda: s.post(OK).status == 200)
        wait(lambda: s.post({"input": ["x"] * 1000}).status == 200)
        for k in lazy:
            k.close()


# ---- too many connections ------------------------------------------------------------------------


@pytest.fixture
def descriptors():
    """Enough for a thousand clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_clients_that_left_hold_no_connection():
    with server() as s:
        for data in (b"", b"GET", head(100) + b"{", b"\r\n", get()):
            for close in (True, False):
                for _ in range(20):
                    k = connect(s, data)
                    if close:
                        k.close()
                        continue
                    k.shutdown(socket.SHUT_WR)
                    assert to_end(k).startswith(b"HTTP/1.1 200" if data == get() else b"")
        s.wait_metric("qemb_connections", lambda x: x == 1)


def test_a_thousand_slow_clients_lock_nobody_out(descriptors):
    """More than there are connections. Those that are idle or slow make room for one that asks."""
    with server() as s:
        slow = [connect(s, d) for d in (b"", b"GET /health HTTP/1.1\r\nX: ", head(50) + b"{")
                for _ in range(400)]
        for _ in range(3):
            assert s.request("GET", "/health").status == 200
            assert len(s.embed(["x"])) == 1
        assert any(is_closed(k) for k in slow)
        assert s.metric("qemb_reaped_total") > 0
        for k in slow:
            k.close()


def test_work_is_never_evicted():
    """Beyond the limit, /health and /metrics are answered at once; other requests wait for work to
    end; and if more wait than can, those get 429. No request that is computed is lost."""
    with server(*BUSY, "--max-connections", 2) as s:
        slow = [Slow(s, 8, 10 * i) for i in range(2)]
        while s.metric("qemb_queue_requests") < 2:
            time.sleep(0.01)
        time.sleep(1.2)  # longer than an idle connection is kept when others wait
        waiting = [connect(s, post(json.dumps(ask([f"waits {i}"])).encode(),
                                   "Connection: close\r\n")) for i in range(10)]
        assert s.request("GET", "/health").status == 200
        assert s.metric("qemb_connections") > 10
        assert [x.wait().status for x in slow] == [200, 200]
        assert {Response(to_end(k)).status for k in waiting} == {200}


def test_more_wait_than_can():
    """The oldest of them is refused as soon as its place is needed: /health may wait behind it."""
    with server(*BUSY, "--max-connections", 1) as s:
        slow = Slow(s, 20)
        s.wait_metric("qemb_queue_requests", lambda x: x == 1)
        data = post(more="Connection: close\r\n")
        waiting = [connect(s, data) for _ in range(70)]
        said = [s.request("GET", "/health").status for _ in range(8)]
        assert set(said) == {200}
        answers = [Response(to_end(k)) for k in waiting]
        assert {a.status for a in answers} == {200, 429}
        refused = [a for a in answers if a.status == 429]
        assert all(a.headers["retry-after"] == "1" for a in refused)
        assert {json.loads(a.body)["error"]["code"] for a in refused} == {"server_overloaded"}
        assert slow.wait().status == 200
    assert min(e["ms"] for e in s.log if e.get("code") == "server_overloaded") < 1000


# ---- the event thread ----------------------------------------------------------------------------


def test_health_does_not_wait_behind_requests():
    """While threads parse and tokenize long bodies, and clients pipeline, /health is answered again
    and again."""
    with server("--max-queue", 1 << 28) as s:
        text = "今天天气很好，我们去公园散步吧。" * 60000
        body = post(json.dumps({"input": [text]}, ensure_ascii=False).encode(), path="/tokenize")
        busy, n = [connect(s, body[:-1]) for _ in range(10)], 0
        for k in busy:  # the work of all begins now
            k.sendall(body[-1:])
        sent = time.monotonic()
        while len(readable(busy)) < len(busy) - 1:  # both threads of the pool are at work
            assert s.request("GET", "/health").status == 200
            n += 1
            assert time.monotonic() - sent < GUARD
        for k in busy:
            assert one(k).status == 400  # longer than the model reads; told after it was tokenized
            k.close()
        # Each would wait for one of the ten if the threads that work on them answered it.
        assert n > len(busy), f"{n} answers in {time.monotonic() - sent:.1f} s"
