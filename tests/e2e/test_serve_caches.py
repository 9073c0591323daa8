"""The caches of qemb-serve: in memory, and in Redis shared by servers."""

import base64
import contextlib
import json
import re
import socket
import struct
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import REDIS, free_port, redis_server, wait_for
from serve_client import (
    EOS,
    GUARD,
    HIDDEN,
    MODEL,
    QEMB,
    SHORT,
    TEXTS,
    TINY,
    ask,
    qemb,
    server,
    vectors_in,
    vectors_of,
)


def test_cache_serves_every_dimension():
    texts = [t for t in TEXTS if t != "two"]
    with server() as s:
        s.embed(texts)
        computed = s.metric("qemb_computed_texts_total")
        for dim in (HIDDEN, 17, 1):
            want = qemb(
                "--output", "base64", "--dim", str(dim), records=[{"text": t} for t in texts]
            )
            assert s.embed(texts, dimensions=dim) == want
        assert s.metric("qemb_computed_texts_total") == computed
        assert s.metric("qemb_cache_hits_total") == 3 * len(texts) + 1
        assert s.metric("qemb_cache_misses_total") == len(texts) - 1  # the probe was the empty text
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
            s.embed([[k % 250, k // 250 + 1, EOS] for k in range(i, i + 400)], dimensions=1)
            assert s.metric("qemb_cache_bytes") <= 1 << 20
        assert s.metric("qemb_cache_bytes") > 900000


def with_redis(port):
    """Options of a server that uses this Redis and serves every hit, with time for a busy
    machine."""
    return ("--redis", f"127.0.0.1:{port}", "--redis-timeout", 60000, "--redis-check", 0)


def redis_value(name, floats):
    """What Redis has under that name: the floats (bytes) and a CRC-32."""
    return floats + struct.pack("<I", zlib.crc32(floats, zlib.crc32(name)))


class Redis:
    def __init__(self, port=None):
        self.port = port or free_port()
        options = ["--port", self.port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = redis_server(*options, stdout=subprocess.DEVNULL, cwd="/tmp")
        until = time.monotonic() + GUARD
        while True:
            with contextlib.suppress(OSError), socket.create_connection(
                ("127.0.0.1", self.port)
            ) as k:
                k.sendall(b"PING\r\n")
                if k.recv(5) == b"+PONG":
                    return
            assert time.monotonic() < until and self.process.poll() is None
            time.sleep(0.02)

    @contextlib.contextmanager
    def reply(self, *words):
        """A file with the reply to a command."""
        with socket.create_connection(("127.0.0.1", self.port), GUARD) as k:
            f = k.makefile("rwb")
            f.write(b"*%d\r\n" % len(words))
            for w in words:
                f.write(b"$%d\r\n%s\r\n" % (len(w), w))
            f.flush()
            yield f

    def command(self, *words, lines=0):
        """The first line of the reply; or a list of so many."""
        with self.reply(*words) as f:
            got = [f.readline().removesuffix(b"\r\n") for _ in range(lines or 1)]
            return got if lines else got[0]

    def keys(self):
        """All keys, of any bytes."""
        with self.reply(b"KEYS", b"*") as f:
            n = int(f.readline()[1:])
            return [f.read(int(f.readline()[1:]) + 2)[:-2] for _ in range(n)]

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis():
    if not REDIS:
        pytest.skip("redis-tools: not installed")
    r = Redis()
    yield r
    r.kill()


def wait_stored(r, n):
    wait_for(lambda: int(r.command(b"DBSIZE")[1:]) >= n, GUARD)


def test_redis_is_shared(redis):
    texts = [f"shared {i}" for i in range(40)]
    with server("--cache", 0, *with_redis(redis.port)) as a:
        want = a.embed(texts)
        wait_stored(redis, 41)  # the probe's, too
    with server("--cache", 0, *with_redis(redis.port)) as b:
        assert b.embed(texts) == want
        assert b.embed([*texts[:3], "unknown"], dimensions=5)[:3] == [
            base64.b64encode(v).decode()
            for v in [
                base64.b64decode(x)
                for x in qemb(
                    "--output", "base64", "--dim", "5", records=[{"text": t} for t in texts[:3]]
                )
            ]
        ]
        assert b.metric("qemb_redis_hits_total") == 43
        assert b.metric("qemb_computed_texts_total") == 2  # the probe and the unknown one


def with_header(path, at, new):
    """The small model with other bytes in its header, as a file at path."""
    data = bytearray(Path(MODEL).read_bytes())
    data[at : at + len(new)] = new
    struct.pack_into("<Q", data, 24, 0)
    checksum = 0xCBF29CE484222325
    for b in data[: 4096 + 96 * struct.unpack_from("<I", data, 32)[0]]:
        checksum = (checksum ^ b) * 0x100000001B3 % 2**64
    struct.pack_into("<Q", data, 24, checksum)
    path.write_bytes(data)
    return str(path)


def test_a_model_without_end_of_text(tmp_path):
    """A key has all ids: texts that differ in the last one alone have different vectors."""
    path = with_header(tmp_path / "small.qemb", 104, b"\xff" * 4)
    lists = [[1, 2], [1, 3], [1], [0], [2]]
    want = qemb("--output", "base64", records=[{"ids": ids} for ids in lists], model=path)
    assert len(set(want)) == len(lists)
    with server("--allow-token-ids", model=path) as s:
        for _ in range(2):
            assert s.embed(lists) == want
        a = s.post(ask([""]))
        assert a.status == 400 and a.error["code"] == "empty_text"


def test_models_do_not_share_keys(redis, tmp_path):
    with server(*with_redis(redis.port)) as a:
        one = a.embed([[1, 2, EOS]])
        wait_stored(redis, 2)
    # one weight differs, and with it the recorded digest
    other = with_header(tmp_path / "other.qemb", 40, bytes([Path(MODEL).read_bytes()[40] ^ 1]))
    with server(*with_redis(redis.port), "--name", "small", model=other) as b:
        assert b.embed([[1, 2, EOS]]) == one and b.metric("qemb_redis_hits_total") == 0


def test_tables_share_no_vectors(redis):
    lists, stored = [[1, 2, 3, EOS], [4, 5, EOS]], 0
    refusal = subprocess.run([QEMB, "--cpu", "abacus"], stderr=subprocess.PIPE, timeout=GUARD)
    for table in re.search(r"want (.*)\)", refusal.stderr.decode())[1].split(", "):
        want = qemb("--cpu", table, "--output", "base64", records=[{"ids": ids} for ids in lists])
        with server(*with_redis(redis.port), "--cpu", table) as s:
            assert s.embed(lists) == want
            assert s.metric("qemb_redis_hits_total") == 0
            stored += 1 + len(lists)
            wait_stored(redis, stored)
    assert stored


def test_what_one_table_serves_is_shared(redis):
    """Keys hold the table, whatever options chose it."""
    with server(*with_redis(redis.port), "--cpu", "plain") as s:
        one = s.embed([[1, 2, EOS]])
        wait_stored(redis, 2)
    with server(*with_redis(redis.port), "--cpu", "plain", "--math", "int8") as s:
        assert s.embed([[1, 2, EOS]]) == one and s.metric("qemb_redis_hits_total") == 1


def test_wrong_values_in_redis_are_misses(redis):
    with server("--cache", 0, *with_redis(redis.port)) as s:
        wait_stored(redis, 1)  # the probe's text, the empty one: there is one key
        want = s.embed([""])
        key = redis.keys()[0]
        good = redis.command(b"GET", key, lines=2)
        assert good[0] == b"$%d" % (4 * HIDDEN + 4)
        floats = (b"\0" * 4 * HIDDEN, b"\xff" * 4 * HIDDEN)
        for value in (b"", b"short", *(redis_value(key, x) for x in floats)):
            assert redis.command(b"SET", key, value) == b"+OK"
            hits = s.metric("qemb_redis_hits_total")
            assert s.embed([""]) == want
            assert s.metric("qemb_redis_hits_total") == hits
            # Vectors are stored asynchronously; not again, if the text joined the probe's batch,
            # which had not ended.
            until = time.monotonic() + GUARD
            while redis.command(b"GET", key, lines=2) != good:
                assert time.monotonic() < until
                assert s.embed([""]) == want
                time.sleep(0.02)
        assert s.metric("qemb_redis_errors_total") == 0
        assert s.metric("qemb_redis_bad_values_total") >= 4


def test_redis_absent_slow_or_babbling():
    listening = socket.create_server(("127.0.0.1", 0))  # accepts connections, never answers
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
            while not s.of["redis_up"]:
                s.embed(["wake up"])
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            again.kill()


def test_two_models_share_no_vectors(redis):
    with server(*with_redis(redis.port), "--fallback", TINY, "--allow-token-ids") as s:
        s.wait_log("ready", 2)
        want = [vectors_of(SHORT, m) for m in (MODEL, TINY)]
        ids = [[1, 2, 3], [4]]  # other texts, or invalid, for the other model
        for n in range(2):
            for model, vectors in zip(("small", "hf-tiny"), want):
                a = s.post(ask(SHORT, model=model))
                assert vectors_in(a) == vectors and a.json["model"] == model
            same = [
                vectors_in(s.post(ask(ids, model=m, dimensions=8))) for m in ("small", "hf-tiny")
            ]
            assert same[0][0] != same[1][0] and same[0][1] != same[1][1]
        wait_stored(redis, 2 * (len(set(SHORT)) + len(ids)))
        assert [m.id for m in s.openai().models.list()] == ["small", "hf-tiny"]
        models = [dict(k[1])["model"] for k in s.metrics() if k[0] == "qemb_model_info"]
        assert models == ["small", "hf-tiny"]
        assert s.metric("qemb_fallbacks_total") == 0
