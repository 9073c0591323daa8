"""Shared by the tests of qemb-serve: starts and stops servers, sends requests, and runs ./qemb,
whose vectors have to be the same to the bit.

QEMB_SERVE_BIN names the server (default ./qemb-serve), for example one with sanitizers, whose
reports show as a wrong exit status. QEMB_BIN names the ./qemb to compare with. Every server listens
on a free port of the loopback, is stopped by SIGTERM and has to exit with status 0."""
import collections
import contextlib
import http.client
import json
import os
import select
import signal
import subprocess
import threading
import time

import openai
import pytest
from helpers import QEMB, ROOT, SMALL as MODEL, is_sanitized, jsonl
from prometheus_client.parser import text_string_to_metric_families

SERVE = os.path.abspath(os.environ.get("QEMB_SERVE_BIN", ROOT / "qemb-serve"))
HIDDEN, MAX_TOKENS, EOS, VOCAB = 128, 2048, 2557, 2560
SANITIZED = is_sanitized(SERVE)
GUARD = 240 if SANITIZED else 60  # seconds until a run counts as hung; nothing here is timed
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
    """Returns the output lines of ./qemb for JSON records."""
    command = [QEMB, *args[:1], "-m", model, "--input", "jsonl", *args[1:]]
    if args and args[0].startswith("-"):
        command = [QEMB, "-m", model, "--input", "jsonl", *args]
    done = subprocess.run(command, input=jsonl(*records), stdout=subprocess.PIPE, timeout=GUARD)
    assert done.returncode == 0
    return done.stdout.decode().splitlines()


class Answer:
    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()
        self.reason = response.reason

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        e = self.json["error"]
        assert set(e) == {"message", "type", "param", "code"}
        return e


PATIENT = ("--deadline", "600", "--receive-timeout", "600")  # long enough for a busy machine


class Server:
    def __init__(self, *args, model=MODEL, wait="ready", program=None):
        self.log, self.raw, self.changed = [], [], threading.Condition()
        self.of = collections.defaultdict(list)  # event -> its lines of the log
        self.process = subprocess.Popen(
            [program or SERVE, "-m", model, "--port", "0", "--threads", "1", *PATIENT,
             *map(str, args)],
            stderr=subprocess.PIPE,
            pipesize=1 << 20,  # the server drops lines for which there is no room
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
                    self.keep(json.loads(line))
                except ValueError:
                    self.keep({"event": "not JSON", "line": line})
                self.changed.notify_all()
        with self.changed:
            self.keep({"event": "end of log"})
            self.changed.notify_all()

    def keep(self, line):
        self.log.append(line)
        self.of[line["event"]].append(line)

    def wait_log(self, event, n=1):
        """Returns the n-th log line of that event."""

        with self.changed:
            there = lambda: len(self.of[event]) >= n
            assert self.changed.wait_for(lambda: there() or self.of["end of log"], GUARD), (
                f"no {event} in the log"
            )
            assert there(), b"".join(self.raw).decode()
            return self.of[event][n - 1]

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
        a = self.post({"model": "small", "input": texts, "encoding_format": "base64", **more})
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
        assert not self.of["not JSON"], text[-8000:]


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
# Each long text fills a batch of its own and takes a while.
BUSY_CPU = () if SANITIZED else ("--cpu", "plain")
BUSY = ("--batch-tokens", LONG, *BUSY_CPU)


def long_ids(i, n=LONG):
    """Returns the token ids of a long text that shares no prefix with any other."""
    return [i % 250, i // 250 % 250] + [(i * 7 + k) % 250 for k in range(n - 3)] + [EOS]


def slow_request(n=10, start=0, **more):
    """Returns long texts, all different, that take a while to compute."""
    texts = [long_ids(start + i) for i in range(n)]
    return {"model": "small", "input": texts, "dimensions": 1, **more}


class Slow:
    """Sends a request that keeps the model busy, in a thread."""

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


OK = {"model": "small", "input": "x"}
# hidden 32, a tokenizer of its own, 200 tokens
TINY = str(ROOT / "tests" / "golden" / "hf-tiny.qemb")
SHORT = [t for t in TEXTS if len(t) < 200]


def vectors_of(texts, model, *args):
    return qemb("--output", "base64", *args, records=[{"text": t} for t in texts], model=model)


def vectors_in(a):
    assert a.status == 200, a.body
    return [e["embedding"] for e in a.json["data"]]


def ask(texts, **more):
    return {"model": "small", "input": texts, "encoding_format": "base64", **more}


def readable(sockets):
    """Those that can be read at once. select() would take no descriptor of 1,024 or more."""
    poll, of = select.poll(), {k.fileno(): k for k in sockets}
    for fd in of:
        poll.register(fd, select.POLLIN)
    return [of[fd] for fd, _ in poll.poll(0)]


def is_closed(k):
    try:
        return bool(readable([k])) and k.recv(1) == b""
    except ConnectionError:
        return True
