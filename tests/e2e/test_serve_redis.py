"""What a Redis can do to qemb-serve: it is slow, silent, hostile, full, guarded or damaged. Each
costs the hit: the vectors stay those of ./qemb, other requests are answered, and SIGTERM ends the
server.

`Fake` is a Redis that keeps what it gets and replies as a test wants. Its time-outs are those of a
hang; nothing here is timed."""

import contextlib
import math
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest
import serve_client
from helpers import REDIS, ROOT, free_port, redis_server, wait_for
from serve_client import GUARD, MODEL, SANITIZED, SERVE, TINY, ask, qemb, server
from test_devices import SMALL as ON_FAKE_GPUS
from test_serve_caches import Redis, redis, redis_value, wait_stored, with_redis  # noqa: F401

TEXTS = [f"text {i}" for i in range(4)]
HANG = 40  # seconds; less than the time-outs of PATIENT below
PATIENT = ("--redis-timeout", 60000, "--redis-check", 0)


@pytest.fixture(scope="module")
def want():
    return vectors_of(TEXTS)


def vectors_of(texts, model=MODEL):
    return qemb("--output", "base64", records=[{"text": t} for t in texts], model=model)


# ---- a Redis that replies as a test wants --------------------------------------------------------


def bulk(value):
    return b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value)


def array(values):
    return b"*%d\r\n" % len(values) + b"".join(bulk(v) for v in values)


def parse_command(f):
    line = f.readline()
    if not line:
        return None
    words = []
    for _ in range(int(line[1:])):
        words.append(f.read(int(f.readline()[1:]) + 2)[:-2])
    return words


class Fake:
    """get(names, values) and set(name, value) return the bytes of the reply to an MGET or a SET, or
    pieces of them, with pauses between where `pause` says so."""

    def __init__(self):
        self.kept, self.gets, self.sets, self.pause = {}, 0, 0, 0
        self.get = lambda names, values: array(values)
        self.set = lambda name, value: b"+OK\r\n"
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.open = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                k, _ = self.socket.accept()
                k.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.open.append(k)
                threading.Thread(target=self.serve, args=(k,), daemon=True).start()

    def serve(self, k):
        with contextlib.suppress(OSError, ValueError), k, k.makefile("rb") as f:
            while words := parse_command(f):
                for piece in self.reply(words):
                    k.sendall(piece)
                    time.sleep(self.pause)

    def reply(self, words):
        if words[0] == b"MGET":
            self.gets += 1
            r = self.get(words[1:], [self.kept.get(n) for n in words[1:]])
        elif words[0] == b"AUTH":
            r = b"+OK\r\n"
        else:
            assert words[0] == b"SET" and words[3] == b"EX"
            r = self.set(words[1], words[2])
            if r == b"+OK\r\n":
                self.kept[words[1]] = words[2]
            self.sets += 1
        return [r] if isinstance(r, bytes) else r

    def close(self):
        for k in [self.socket, *self.open]:
            with contextlib.suppress(OSError):
                k.shutdown(socket.SHUT_RDWR)
            k.close()


@pytest.fixture
def fake():
    f = Fake()
    yield f
    f.close()


def at(port):
    return ("--cache", 0, "--redis", f"127.0.0.1:{port}")


def store(s, f, texts=TEXTS):
    """Has the vectors of the texts, and the probe's, stored."""
    s.embed(texts)
    wait_for(lambda: len(f.kept) > len(texts), GUARD)


def bad_count(s):
    return s.metric("qemb_redis_bad_values_total")


# ---- wrong replies -------------------------------------------------------------------------------

# test_redis_reply has more of them.
WRONG_REPLIES = {
    "array of 2,000,000,000": (b"*2000000000\r\n", '(got "*2000000000", want 4 values)'),
    "value of 2 GB": (b"*4\r\n$2000000000\r\n" + b"x" * 1000, "a value too long"),
    "integers": (b"*4\r\n" + b":5\r\n" * 4, "not a value"),
    "no reply at all": (bytes(range(256)) * 4, "a line without an end"),
    "an error": (b"-LOADING \x1b[2JRedis is loading\r\n", "LOADING ?[2JRedis is loading"),
    "more than one reply": (array([None] * 4) + array([None] * 4), "more than was asked for"),
    "an end in the middle": (array([b"x" * 516] * 4)[:700], "connection was closed"),
}


@pytest.fixture(scope="module")
def patient():
    f = Fake()
    with server(*at(f.port), *PATIENT) as s:
        store(s, f)
        yield s, f
    f.close()


@pytest.mark.parametrize("name", WRONG_REPLIES)
def test_a_wrong_reply_costs_the_hit(patient, want, name):
    """The reason in the log says that the reply was refused for what it is, not for its time."""
    s, f = patient
    good, (reply, reason) = f.get, WRONG_REPLIES[name]
    downs = len(s.of["redis_down"])
    ups = len(s.of["redis_up"])
    errors = s.metric("qemb_redis_errors_total")
    f.get = lambda names, values: cut(reply) if "closed" in reason else reply
    assert s.embed(TEXTS) == want
    assert s.metric("qemb_redis_errors_total") == errors + 1
    line = s.wait_log("redis_down", downs + 1)
    assert reason in line["reason"] and line["port"] == f.port and line["host"] == "127.0.0.1"
    f.get = good
    hits = s.metric("qemb_redis_hits_total")
    wait_for(lambda: s.embed(TEXTS) == want and s.metric("qemb_redis_hits_total") > hits, GUARD,
             0.1)
    s.wait_log("redis_up", ups + 1)


def cut(piece):
    """Half a reply, and the end of the connection."""
    yield piece
    raise OSError


def tampered(change):
    """What change makes of the floats of each value, with its sum made true."""
    return lambda names, values: array([redis_value(n, change(v[:-4])) for n, v in
                                        zip(names, values)])


def all_are(x):
    return lambda floats: struct.pack("<f", x) * (len(floats) // 4)


WRONG_VALUES = {
    "empty": lambda names, values: array([b""] * len(names)),
    "short": tampered(lambda v: v[:-4]),
    "long": tampered(lambda v: v + b"\0\0\0\0"),
    "of 1 MiB": lambda names, values: array([b"x" * (1 << 20)] * len(names)),
    "nan": tampered(all_are(math.nan)),
    "infinite": tampered(all_are(math.inf)),
    "zero": tampered(all_are(0)),
    "longer than the model can": tampered(all_are(1e4)),
    "one bit flipped": lambda names, values: array([v[:9] + bytes([v[9] ^ 1]) + v[10:]
                                                    for v in values]),
    "another text's": lambda names, values: array(values[1:] + values[:1]),
    "without a sum": lambda names, values: array([all_are(1)(v) for v in values]),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_costs_the_hit(patient, want, name):
    s, f = patient
    good, bad = f.get, bad_count(s)
    errors, hits = (s.metric(f"qemb_redis_{x}_total") for x in ("errors", "hits"))
    f.get = WRONG_VALUES[name]
    try:
        assert s.embed(TEXTS) == want
    finally:
        f.get = good
    assert bad_count(s) == bad + len(TEXTS)
    assert s.metric("qemb_redis_errors_total") == errors
    assert s.metric("qemb_redis_hits_total") == hits
    assert s.embed(TEXTS) == want and s.metric("qemb_redis_hits_total") == hits + len(TEXTS)


def test_a_connection_that_was_closed_or_has_bytes_left_is_opened_again(patient, want):
    s, f = patient
    errors = s.metric("qemb_redis_errors_total")
    ways = (lambda k: k.shutdown(socket.SHUT_RDWR), lambda k: k.sendall(array([None] * 4)))
    for spoil in ways * 5:  # there are four getters, each with a connection
        hits = s.metric("qemb_redis_hits_total")
        for k in f.open:
            with contextlib.suppress(OSError):
                spoil(k)
        assert s.embed(TEXTS) == want
        assert s.metric("qemb_redis_hits_total") == hits + len(TEXTS)
    assert s.metric("qemb_redis_errors_total") == errors


# ---- time ----------------------------------------------------------------------------------------


def drip(reply):
    return [reply[i : i + 1] for i in range(len(reply))]


def test_bytes_that_drip_end_at_the_deadline(fake, want):
    """With a time-out for each byte, the reply to one request would take 80 s."""
    with server(*at(fake.port), "--redis-timeout", 300, "--redis-check", 0) as s:
        store(s, fake)
        fake.pause = 0.04
        fake.get = lambda names, values: drip(array(values))
        start = time.monotonic()
        asked = fake.gets
        wait_for(lambda: s.embed(TEXTS) == want and fake.gets >= asked + 2, GUARD, 0.1)
        assert time.monotonic() - start < HANG
        assert "reply" in s.wait_log("redis_down")["reason"]
        assert s.request("GET", "/health").status == 200


def test_bytes_that_never_end_end_at_the_deadline(fake):
    """Values of another length are read past, but not for ever."""
    texts, sent = [f"flood {i}" for i in range(500)], []

    def flood(names, values):
        value = bulk(b"x" * (1 << 20))
        try:
            for i in range(len(names) + 1):
                yield value if i else b"*%d\r\n" % len(names)
        finally:
            sent.append(i)

    want = vectors_of(texts)
    fake.get = flood
    with server(*at(fake.port), "--redis-timeout", 100) as s:
        assert s.embed(texts) == want
        assert "not done" in s.wait_log("redis_down")["reason"]
        wait_for(lambda: sent, GUARD)
        assert sent[0] < len(texts)


@pytest.mark.parametrize("silent", ["get", "set"])
def test_sigterm_does_not_wait_for_redis(fake, silent):
    """The time-out is longer than the test waits."""
    setattr(fake, silent, lambda *a: drip(b"+" + b"O" * 500) if silent == "set" else b"")
    fake.pause = 0.2
    with server(*at(fake.port), *PATIENT, "--drain", 1) as s:
        done = []
        t = threading.Thread(target=lambda: done.append(s.post(ask(["stuck"]))), daemon=True)
        t.start()
        wait_for(lambda: fake.gets and (silent == "get" or fake.sets), GUARD)  # the probe has sets
        start = time.monotonic()
        s.stop()
        assert time.monotonic() - start < HANG
        t.join(GUARD)
        assert done and done[0].status in (200, 429, 503)


PRELOADED = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>
int getaddrinfo(const char *h, const char *s, const struct addrinfo *a, struct addrinfo **r) {
    if (h && !strcmp(h, "silent.test")) for (;;) sleep(1000);
    int (*next)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    *(void **)&next = dlsym(RTLD_NEXT, "getaddrinfo");
    return next(h, s, a, r);
}
"""


@pytest.mark.skipif(SANITIZED, reason="its runtime has to be loaded first")
def test_a_silent_name_server(tmp_path, monkeypatch, want):
    """getaddrinfo cannot be told to end. More requests than there are getters."""
    (tmp_path / "slow.c").write_text(PRELOADED)
    library = tmp_path / "slow.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "slow.c"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    with server("--cache", 0, "--redis", "silent.test:6379", "--redis-timeout", 50) as s:
        monkeypatch.delenv("LD_PRELOAD")
        start = time.monotonic()
        for n in range(5):
            assert s.embed(TEXTS) == want
            wait_for(lambda: s.embed(TEXTS) == want and s.metric("qemb_redis_errors_total") > n,
                     GUARD, 0.1)
        line = s.wait_log("redis_down")
        assert line["host"] == "silent.test" and "look-up" in line["reason"]
        assert time.monotonic() - start < HANG
        start = time.monotonic()
        s.stop()
        assert time.monotonic() - start < HANG


# ---- stores --------------------------------------------------------------------------------------


def test_refused_stores_are_counted_and_said_once(fake, want):
    refusal = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
    with server(*at(fake.port), *PATIENT) as s:
        store(s, fake)
        fake.set = lambda name, value: refusal
        for n in range(2):  # after the first one nothing is stored for a while
            sets = fake.sets
            wait_for(lambda: s.embed([f"new {n} {time.monotonic()}"]) and fake.sets > sets, GUARD,
                     0.1)
        s.wait_metric("qemb_redis_errors_total", lambda n: n >= 2)
        s.wait_metric("qemb_redis_dropped_total", lambda n: n >= 2)
        hits = s.metric("qemb_redis_hits_total")
        assert s.embed(TEXTS) == want and s.metric("qemb_redis_hits_total") == hits + len(TEXTS)
    said = [e.get("reason") for e in s.log if e["event"] in ("redis_refuses", "redis_down")]
    assert said == [refusal[1:-2].decode()]


@pytest.mark.parametrize("ttl, most", [((), 604800), (("--redis-ttl", 100), 100),
                                       (("--redis-ttl", 0), -1)])
def test_entries_expire(redis, ttl, most):
    with server(*with_redis(redis.port), *ttl):
        wait_stored(redis, 1)
        left = int(redis.command(b"TTL", redis.keys()[0])[1:])
        assert left == -1 if most < 0 else most - GUARD <= left <= most


# ---- password, TLS -------------------------------------------------------------------------------


def write(path, text):
    path.write_text(text)
    path.chmod(0o600)
    return path


class Guarded(Redis):
    """A Redis with more arguments, which plain commands may not reach."""

    def __init__(self, *args):
        self.port = free_port()
        options = ["--save", "", "--appendonly", "no", "--bind", "127.0.0.1", *args]
        self.process = redis_server(*options, stdout=subprocess.PIPE, cwd="/tmp")
        while b"Ready to accept" not in (line := self.process.stdout.readline()):
            assert line, "Redis has ended"
        threading.Thread(target=self.process.stdout.read, daemon=True).start()


@contextlib.contextmanager
def guarded(*args):
    if not REDIS:
        pytest.skip("redis-tools: not installed")
    r = Guarded(*args)
    try:
        yield r
    finally:
        r.kill()


def is_shared(*args):
    """Whether one server gets from Redis what another one has stored there."""
    texts = ["a", "b", "c"]
    with server("--cache", 0, *PATIENT, *args) as a:
        one = a.embed(texts)  # stored later
        wait_for(lambda: a.embed(texts) == one and
                 a.metric("qemb_redis_hits_total") >= len(texts), GUARD, 0.05)
    with server("--cache", 0, *PATIENT, *args) as b:
        assert b.embed(texts) == one == vectors_of(texts)
        return b.metric("qemb_redis_hits_total") == len(texts)


def reason_of_failure(*args, event="redis_down"):
    with server("--cache", 0, *PATIENT, *args) as s:
        return s.wait_log(event)["reason"]


def test_password_user_and_database(tmp_path):
    port = free_port()
    right, wrong = (write(tmp_path / n, f"{n}\r\nsecond line\n") for n in ("right", "wrong"))
    user = ("--user", "qemb", "on", ">theirs", "~qemb:*", "+mget", "+set", "+select")
    theirs = write(tmp_path / "theirs", "theirs")
    with guarded("--port", port, "--requirepass", "right", *user):
        plain = ("--redis", f"127.0.0.1:{port}")
        assert reason_of_failure(*plain, event="redis_refuses").startswith("NOAUTH")
        assert "WRONGPASS" in reason_of_failure(*plain, "--redis-password-file", wrong)
        assert is_shared(*plain, "--redis-password-file", right)
        theirs = ("--redis-password-file", theirs)
        assert is_shared("--redis", f"redis://qemb@127.0.0.1:{port}/3", *theirs)
        reason = reason_of_failure("--redis", f"redis://qemb@127.0.0.1:{port}/99", *theirs)
        assert reason.startswith("SELECT: ERR")
        p = subprocess.run(["redis-cli", "-p", str(port), "-a", "right", "info", "keyspace"],
                           capture_output=True, text=True, check=True)
        assert set(re.findall(r"^db(\d+):", p.stdout, re.M)) == {"0", "3"}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """ca.pem, and server.pem with its key, for localhost and 127.0.0.1."""
    d = tmp_path_factory.mktemp("certificates")
    if not shutil.which("openssl"):
        pytest.skip("openssl: not installed")
    run = lambda *a: subprocess.run(["openssl", *a], cwd=d, check=True, capture_output=True)
    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        run(*new, "-x509", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    (d / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    run(*new, "-subj", "/CN=server", "-keyout", "server.key", "-out", "server.csr")
    run("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-extfile",
        "names", "-CAcreateserial", "-out", "server.pem")
    return d


@pytest.mark.skipif(b"__tsan_init" in Path(SERVE).read_bytes(),
                    reason="the thread sanitizer does not see OpenSSL's atomics")
def test_tls(certificates, tmp_path):
    d, port = certificates, free_port()
    password = ("--redis-password-file", write(tmp_path / "password", "secret\n"))
    ca = ("--redis-ca", d / "ca.pem")
    with guarded("--port", 0, "--tls-port", port, "--tls-cert-file", d / "server.pem",
                 "--tls-key-file", d / "server.key", "--tls-ca-cert-file", d / "ca.pem",
                 "--tls-auth-clients", "no", "--requirepass", "secret"):
        for host in ("localhost", "127.0.0.1"):
            assert is_shared("--redis", f"rediss://{host}:{port}", *ca, *password)
        # a name that the certificate does not have
        reason = reason_of_failure("--redis", f"rediss://127.1:{port}", *ca, *password)
        assert re.search("mismatch", reason), reason
        url = ("--redis", f"rediss://localhost:{port}")
        other = reason_of_failure(*url, "--redis-ca", d / "other.pem", *password)
        assert "TLS handshake: " in other and "certificate" in other
        assert "certificate" in reason_of_failure(*url, *password)  # not the system's
        reason_of_failure("--redis", f"127.0.0.1:{port}", *password)  # no TLS where TLS is spoken
    with guarded("--port", port):  # TLS where none is spoken: Redis waits for the end of a line
        url = ("--redis", f"rediss://localhost:{port}", "--redis-timeout", 100)
        assert reason_of_failure(*url) == "TLS handshake: not done in time"


def test_options_that_are_refused(tmp_path):
    secret = write(tmp_path / "secret", "secret")
    empty = write(tmp_path / "empty", "\n")
    long = write(tmp_path / "long", "x" * 2000)
    nul, utf16 = write(tmp_path / "nul", "sec\0ret\n"), write(tmp_path / "utf16", "")
    utf16.write_bytes("secret\n".encode("utf-16"))
    redis_at = lambda x: ("--redis", x)
    for args, message in [
        (redis_at("redis://"), "no host"),
        (redis_at("rediss://:6379"), "no host"),
        (redis_at("redis://h:70000"), "no port"),
        (redis_at("http://h:1"), "no scheme of Redis"),
        (redis_at("redis://h/x"), "no database"),
        (redis_at("redis://[::1]x"), "no host"),
        (redis_at("h" * 300 + ":1"), "too long"),
        (redis_at("redis://me:hunter2@h"), "--redis-password-file"),
        (redis_at("redis://me@h"), "a user without a password"),
        ((*redis_at("h:1"), "--redis-ca", secret), "without TLS"),
        ((*redis_at("rediss://h"), "--redis-ca", secret), "no certificates in PEM"),
        ((*redis_at("h:1"), "--redis-password-file", empty), "no password"),
        ((*redis_at("h:1"), "--redis-password-file", long), "too long"),
        ((*redis_at("h:1"), "--redis-password-file", nul), "NUL in a password"),
        ((*redis_at("h:1"), "--redis-password-file", utf16), "UTF-16, want UTF-8"),
        ((*redis_at("h:1"), "--redis-password-file", tmp_path / "none"), "cannot open"),
        ((*redis_at("h:1"), "--redis-check", 101), "--redis-check"),
    ]:
        p = subprocess.run([SERVE, "-m", MODEL, *map(str, args)], stderr=subprocess.PIPE,
                           timeout=GUARD)
        assert p.returncode == 1 and message in p.stderr.decode(), (args, p.stderr)
        assert b"hunter2" not in p.stderr


@pytest.mark.parametrize("option", ["--redis-password-file", "--api-key-file"])
def test_a_secret_that_all_can_read_is_said(fake, tmp_path, option):
    path = write(tmp_path / "secret", "x")
    path.chmod(0o644)
    with server(*at(fake.port), *PATIENT, option, path) as s:
        assert s.wait_log("readable_secret")["option"] == option
    path.chmod(0o640)
    with server(*at(fake.port), *PATIENT, option, path) as s:
        pass
    assert not s.of["readable_secret"]


def test_on_a_gpu_a_sample_may_differ_a_little(fake, monkeypatch):
    """Without --deterministic. The GPUs are the CPU's, see unit/fake_gpus.c."""
    monkeypatch.setattr(serve_client, "SERVE", str(ROOT / "build/tsan/qemb-serve-devices"))
    a_little = tampered(lambda v: struct.pack("<f", struct.unpack_from("<f", v)[0] + 0.01) + v[4:])
    args = (*at(fake.port), "--redis-timeout", 60000, "--redis-check", 100, *ON_FAKE_GPUS)
    with server(*args, model=TINY) as s:
        store(s, fake)
        fake.get = a_little
        s.embed(TEXTS)
        s.wait_metric("qemb_redis_checked_total", lambda x: x == len(TEXTS))
        assert checked(s)[1] == 0
        fake.get = tampered(lambda v: v[4:] + v[:4])
        s.embed(TEXTS)
        s.wait_log("redis_mismatch")
    fake.get = a_little
    with server(*args, "--deterministic", model=TINY) as s:
        s.embed(TEXTS)
        s.wait_log("redis_mismatch")


# ---- which vectors are shared, and samples -------------------------------------------------------


def test_other_weights_share_nothing(redis, tmp_path):
    """A file with one bit of a weight flipped, which its header does not tell."""
    texts = ["a", "b"]
    data = bytearray(open(MODEL, "rb").read())
    data[len(data) // 2] ^= 1  # of a matrix, which has no checksum of its own
    damaged = tmp_path / "small.qemb"
    damaged.write_bytes(data)
    with server(*with_redis(redis.port)) as s:
        s.embed(texts)
        wait_stored(redis, 3)
        sound = s.wait_log("loaded")["fingerprint"], s.wait_log("weights")["checksum"]
    with server(*with_redis(redis.port), model=str(damaged)) as s:
        s.embed(texts)
        assert s.metric("qemb_redis_hits_total") == 0
        other = s.wait_log("loaded")["fingerprint"], s.wait_log("weights")["checksum"]
        assert sound[0] == other[0] and sound[1] != other[1]
    assert {k[7:23].hex() for k in redis.keys()} == {sound[1], other[1]}


def checked(s):
    return s.metric("qemb_redis_checked_total"), s.metric("qemb_redis_mismatches_total")


def test_samples_are_computed_and_compared(fake, want):
    with server(*at(fake.port), "--redis-timeout", 60000, "--redis-check", 100) as s:
        store(s, fake)
        for n in range(1, 4):
            assert s.embed(TEXTS) == want
            s.wait_metric("qemb_redis_checked_total", lambda x: x == n * len(TEXTS))
        assert checked(s) == (3 * len(TEXTS), 0)
        assert s.metric("qemb_redis_hits_total") == 0
        fake.get = tampered(lambda v: v[4:] + v[:4])  # of the right length, and wrong
        assert s.embed(TEXTS) == want
        s.wait_log("redis_mismatch")
        assert checked(s)[1] >= 1
        gets, sets = fake.gets, fake.sets
        assert s.embed([*TEXTS, "new"])[:-1] == want
        assert (fake.gets, fake.sets) == (gets, sets)  # Redis is left alone
        assert s.metric("qemb_redis_dropped_total") >= 1


def test_a_wrong_sample_empties_the_memory_too(fake):
    """Half of the hits are served, wrong, and kept in memory, until one is found out."""
    texts = [f"half {i}" for i in range(64)]
    want = vectors_of(texts)
    with server(*at(fake.port), *PATIENT) as s:
        store(s, fake, texts)
    fake.get = tampered(lambda v: v[4:] + v[:4])
    args = ("--redis", f"127.0.0.1:{fake.port}", "--redis-timeout", 60000, "--redis-check", 50)
    with server(*args) as s:
        first = s.embed(texts)
        wrong = sum(a != b for a, b in zip(first, want))
        assert 0 < wrong < len(texts)  # but for a chance of 2^-63
        s.wait_log("redis_mismatch")
        assert s.embed(texts) == want
