"""The clients of a soak. Good ones send what the manual allows and must get the bits of ./qemb or a
refusal that the manual names; hostile ones send what must be refused, or hold what they can."""
import base64
import contextlib
import gzip
import json
import random
import socket
import subprocess
import threading
import time
import zlib

import numpy as np
import zstandard
from account import Loss

GUARD = 60   # seconds without an answer that count as a hang
DIM = 24     # of the vectors that are asked for shorter
LONG = 1500  # characters of a long text


class Oracle:
    """What ./qemb says of the texts, computed before the run. The server's answers must have its
    bits; nothing of the server is used."""

    def __init__(self, qemb, model, texts, reranker=None, pairs=()):
        self.qemb, self.model, self.texts = qemb, model, texts
        records = [{"text": t} for t in texts]
        self.full = dict(zip(texts, self.lines(["-m", model], "base64", records)))
        self.cut = dict(zip(texts, self.lines(["-m", model, "--dim", str(DIM)], "base64",
                                              records)))
        self.ids = {t: json.loads(line) for t, line in zip(texts, self.lines(
            ["tokenize", "-m", model], None, records))}
        self.long = [t for t in texts if len(t) > LONG]
        self.pairs = list(pairs)
        asked = [{"query": q, "documents": d} for q, d in self.pairs]
        ranked = self.lines(["rerank", "-m", reranker], None, asked) if reranker else []
        self.ranked = [exact(line)["results"] for line in ranked]

    def lines(self, args, output, records):
        args = [self.qemb, *args, *(["--output", output] if output else [])]
        args += [] if "rerank" in args else ["--input", "jsonl"]
        data = "".join(json.dumps(r) + "\n" for r in records).encode()
        done = subprocess.run(args, input=data, stdout=subprocess.PIPE, check=True)
        lines = done.stdout.decode().splitlines()
        assert len(lines) == len(records)
        return lines

    def floats(self, text):
        return np.frombuffer(base64.b64decode(self.full[text]), "<f4")


def exact(body):
    """The JSON with its numbers as they are written: equal ones are equal to the bit."""
    return json.loads(body, parse_float=str)


def make_texts(words, n, seed):
    """n texts: short, some of hundreds of tokens, a few long ones, odd ones; all different."""
    rng = random.Random(seed)
    texts = ["", "two", "  spaces  ", "a\nnewline", "nul \0 inside", "😀 中文 русский", "é" * 40]
    for i in range(n):
        length = 350 if i % 150 == 7 else 80 if i % 20 == 3 else rng.randint(1, 20)
        texts.append(f"{i} " + " ".join(rng.choices(words, k=length)))
    return texts


# ---- HTTP ----------------------------------------------------------------------------------------


class Closed(Exception):
    """The connection ended before the whole answer; .got: what came."""

    def __init__(self, got=b""):
        super().__init__(f"closed after {len(got)} bytes: {got[:100]}")
        self.got = got


class Reader:
    """Answers of one connection, one after the other."""

    def __init__(self, sock, pace=None):
        self.sock, self.pace, self.buffer = sock, pace, b""
        self.until = time.monotonic() + GUARD

    def more(self):
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        try:
            got = self.sock.recv(self.pace[0] if self.pace else 1 << 18)
        except (ConnectionError, BrokenPipeError):
            got = b""
        if not got:
            raise Closed(self.buffer)
        if self.pace:
            time.sleep(self.pace[1])
        self.buffer += got

    def answer(self):
        while b"\r\n\r\n" not in self.buffer:
            self.more()
        head, rest = self.buffer.split(b"\r\n\r\n", 1)
        lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, v in (h.split(":", 1) for h in lines[1:])}
        parts = [rest]  # not self.buffer: a large answer comes in many pieces
        have, want = len(rest), int(headers.get("content-length", 1 << 40))
        while have < want:
            self.buffer = b""
            try:
                self.more()
            except Closed:
                if want < 1 << 40:
                    raise Closed(head + b"\r\n\r\n" + b"".join(parts)) from None
                break
            parts.append(self.buffer)
            have += len(self.buffer)
        body = b"".join(parts)
        self.buffer = body[want:]
        return int(lines[0].split()[1]), headers, body[:want]


def head(path, length, *more, method="POST"):
    lines = [f"{method} {path} HTTP/1.1", "Host: soak", "Content-Type: application/json", *more]
    lines += [f"Content-Length: {length}"] if length is not None else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Client:
    """One thread's: a server, its oracle, a stream of chances, and a connection that is kept."""

    def __init__(self, server, account, seed):
        self.server, self.account, self.rng = server, account, random.Random(seed)
        self.oracle, self.kept, self.sent, self.wrong = server.oracle, None, b"", None
        self.auth = [f"Authorization: Bearer {server.key}"] if server.key else []

    def connect(self, receive=None):
        s = socket.socket()
        try:
            s.settimeout(GUARD)
            if receive:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
            s.connect(("127.0.0.1", self.server.port))
        except BaseException:
            s.close()
            raise
        return s

    def request(self, path, body, *more, method="POST"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        length = None if method == "GET" else len(data)
        self.sent = head(path, length, *self.auth, *more, method=method) + data
        return self.sent

    def keep(self, s):
        if self.kept and self.kept is not s:
            self.kept.close()
        self.kept = s

    def exchange(self, data):
        """The answer, on the kept connection. A server may close an idle one at any time: then once
        more on a new one, as every HTTP client does."""
        for s in [self.kept, None] if self.kept else [None]:
            old, s = s is not None, s or self.connect()
            try:
                s.sendall(data)
                answer = Reader(s).answer()
            except (Closed, ConnectionError) as e:
                s.close()
                self.kept = None
                if not old or getattr(e, "got", b""):
                    raise
                continue
            except BaseException:
                s.close()
                self.kept = None
                raise
            self.keep(s if answer[1].get("connection", "").lower() != "close" else None)
            return answer
        raise AssertionError


# ---- good clients --------------------------------------------------------------------------------


def refusal(answer, documented):
    """The outcome of a documented refusal, or None."""
    status, headers, body = answer
    if status not in (429, 503):
        return None
    e = json.loads(body)["error"]
    code = e.get("code") if isinstance(e, dict) else None
    if not headers.get("retry-after", "").isdigit() or (code and code not in documented):
        return None
    return f"refused: {status} {code or ''}".rstrip()


def expect(c, answer, check):
    """The outcome of a good request: right bits or a documented refusal; else a loss."""
    status, headers, body = answer
    if status == 200:
        if not check(body):
            raise Loss("the bits of ./qemb", body[:300])
        return "right"
    refused = refusal(answer, c.server.documented)
    if not refused:
        raise Loss("200, or a documented refusal with Retry-After", (status, headers, body[:300]))
    time.sleep(min(1, int(headers["retry-after"])))
    return refused


def embed(c, texts, **more):
    """A request in one of the APIs' forms, and the check of its answer."""
    form = c.rng.choice(["base64", "base64", "float", "cut", "tei", "ollama"])
    o = c.oracle
    if form == "base64":
        want = [o.full[t] for t in texts]
        return ("/v1/embeddings", {"input": texts, "encoding_format": "base64", **more},
                lambda b: [e["embedding"] for e in json.loads(b)["data"]] == want)
    if form == "cut":
        want = [o.cut[t] for t in texts]
        return ("/v1/embeddings", {"input": texts, "encoding_format": "base64",
                                   "dimensions": DIM, **more},
                lambda b: [e["embedding"] for e in json.loads(b)["data"]] == want)

    def same(vectors):
        got = np.array(vectors, "<f4")
        return got.tobytes() == np.array([o.floats(t) for t in texts], "<f4").tobytes()

    if form == "float":
        return ("/v1/embeddings", {"input": texts, **more},
                lambda b: same([e["embedding"] for e in json.loads(b)["data"]]))
    if form == "tei":
        return "/embed", {"inputs": texts}, lambda b: same(json.loads(b))
    return "/api/embed", {"input": texts}, lambda b: same(json.loads(b)["embeddings"])


def pick(c, n, most=LONG):
    """n texts, half of them of the few that are asked for often."""
    texts = []
    while len(texts) < n:
        t = c.rng.choice(c.oracle.texts[:200] if c.rng.random() < 0.5 else c.oracle.texts)
        texts += [t] if len(t) < most else []
    return texts


def one(c):
    path, body, check = embed(c, pick(c, 1))
    return expect(c, c.exchange(c.request(path, body)), check)


def batch(c):
    path, body, check = embed(c, pick(c, c.rng.randint(2, 48)))
    return expect(c, c.exchange(c.request(path, body)), check)


def long_text(c):
    path, body, check = embed(c, [c.rng.choice(c.oracle.long)])
    return expect(c, c.exchange(c.request(path, body)), check)


def token_ids(c):
    texts = pick(c, 4)
    body = {"input": [c.oracle.ids[t] for t in texts], "encoding_format": "base64"}
    want = [c.oracle.full[t] for t in texts]
    return expect(c, c.exchange(c.request("/v1/embeddings", body)),
                  lambda b: [e["embedding"] for e in json.loads(b)["data"]] == want)


def encoded(c):
    name, encode = c.rng.choice([("gzip", gzip.compress), ("deflate", zlib.compress),
                                 ("zstd", zstandard.ZstdCompressor().compress)])
    path, body, check = embed(c, pick(c, 8))
    data = c.request(path, encode(json.dumps(body).encode()), f"Content-Encoding: {name}")
    return expect(c, c.exchange(data), check)


def chunked(c):
    path, body, check = embed(c, pick(c, 3))
    data = json.dumps(body).encode()
    cut = c.rng.randrange(1, len(data))
    c.sent = head(path, None, *c.auth, "Transfer-Encoding: chunked") + b"".join(
        b"%x\r\n%s\r\n" % (len(p), p) for p in (data[:cut], data[cut:], b""))
    return expect(c, c.exchange(c.sent), check)


def rerank(c):
    if not c.oracle.ranked:
        return one(c)
    i = c.rng.randrange(len(c.oracle.pairs))
    query, documents = c.oracle.pairs[i]
    data = c.request("/v1/rerank", {"query": query, "documents": documents})
    return expect(c, c.exchange(data), lambda b: exact(b)["results"] == c.oracle.ranked[i])


def pipelined(c):
    """Three requests in one write: three answers, in order."""
    asked = [embed(c, pick(c, 1)) for _ in range(3)]
    data = b"".join(c.request(path, body) for path, body, _ in asked)
    c.sent = data
    with c.connect() as s:
        s.sendall(data)
        r = Reader(s)
        outcomes = [expect(c, r.answer(), check) for _, _, check in asked]
    return max(outcomes)  # "right" or the refusal, whichever is later in the alphabet


def half_closed(c):
    path, body, check = embed(c, pick(c, c.rng.choice([1, 1, 30])))
    with c.connect() as s:
        s.sendall(c.request(path, body))
        s.shutdown(socket.SHUT_WR)
        return expect(c, Reader(s).answer(), check)


def in_pieces(c):
    path, body, check = embed(c, pick(c, 2))
    data = c.request(path, body)
    with c.connect() as s:
        for at in range(0, len(data), 64):
            s.sendall(data[at:at + 64])
            time.sleep(0.002)
        return expect(c, Reader(s).answer(), check)


def slow_sender(c):
    """Steady: 12 KB/s for twice the time that a client may be without progress."""
    path, body, check = embed(c, pick(c, 40, 200))
    data = c.request(path, json.dumps(body).encode() + b" " * (24000 * c.server.patience))
    step, pause = max(1, len(data) // 40), 2 * c.server.patience / 40
    with c.connect() as s:
        for at in range(0, len(data), step):
            s.sendall(data[at:at + step])
            time.sleep(pause)
        return expect(c, Reader(s).answer(), check)


def slow_reader(c):
    """Steady: an answer of some megabytes, more than sockets hold, read in twice that time."""
    texts = pick(c, 2000, 200)
    want = np.array([c.oracle.floats(t) for t in texts], "<f4")
    data = c.request("/v1/embeddings", {"input": texts})
    pieces = want.size * 13 / 8192
    with c.connect(receive=8192) as s:
        s.sendall(data)
        r = Reader(s, pace=(8192, 2 * c.server.patience / pieces))
        r.until += 4 * c.server.patience
        return expect(c, r.answer(), lambda b: np.array(
            [e["embedding"] for e in json.loads(b)["data"]], "<f4").tobytes() == want.tobytes())


def last_request(c):
    """Takes a while: no cache has all of its texts."""
    texts = [t for t in c.oracle.texts if LONG > len(t) > 300]
    c.rng.shuffle(texts)
    path, body, check = embed(c, texts)
    return expect(c, c.exchange(c.request(path, body)), check)


def health(c):
    path = c.rng.choice(["/health", "/health", "/metrics"])
    with c.connect() as s:
        s.sendall(c.request(path, b"", method="GET"))
        answer = Reader(s).answer()
    if answer[0] != 200:
        raise Loss("200", answer)
    return "right"


GOOD = {one: 30, batch: 20, long_text: 3, token_ids: 6, encoded: 6, chunked: 4, rerank: 10,
        pipelined: 3, half_closed: 3, in_pieces: 2}
STEADY = (slow_sender, slow_reader)
MAY_BE_CLOSED = {"memory", "flood"}  # faults in which a connection cannot always be kept


def run_good(c, kind):
    """One request, and its line in the account."""
    start, name = time.monotonic(), kind.__name__
    began = c.account.now()
    timed = "health" if kind is health else "good" if kind in GOOD else None
    calm = not c.account.active(c.server.name)
    try:
        outcome = kind(c)
    except (Closed, ConnectionError) as e:
        faults = MAY_BE_CLOSED.intersection(c.account.active(c.server.name, began))
        if faults and not getattr(e, "got", b""):
            c.account.add(c.server.name, name, f"closed: {min(faults)}")
            time.sleep(0.1)
        else:
            c.account.lose(c.server.name, name, Loss("an answer", e), c.sent)
            time.sleep(0.5)
    except TimeoutError:
        c.account.lose(c.server.name, name, Loss(f"an answer in {GUARD} s", "none"), c.sent)
    except (Loss, ValueError, KeyError, IndexError, TypeError) as e:
        c.account.lose(c.server.name, name, e, c.sent)
        time.sleep(0.5)
    else:
        calm = calm and not c.account.active(c.server.name, began)
        c.account.add(c.server.name, name, outcome, timed, time.monotonic() - start, calm)


def good_client(c, stop, kinds, pause=0.0):
    names, weights = list(kinds), list(kinds.values())
    while not stop.wait(pause):
        run_good(c, c.rng.choices(names, weights)[0])
    c.keep(None)


# ---- hostile clients: what must be refused -------------------------------------------------------

SECOND = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"  # what a smuggled request would be


def framings(key):
    """{name: bytes}: heads that two readers understand differently. Each must get one 400, in JSON,
    and the end of the connection; what follows must never be read as a request."""
    auth = f"Authorization: Bearer {key}\r\n".encode() if key else b""
    body = b'{"input":"x"}'

    def post(*headers, body=body, path=b"/v1/embeddings", end=b"\r\n"):
        lines = [b"POST " + path + b" HTTP/1.1", b"Host: x", *headers]
        return end.join(lines) + end + auth.replace(b"\r\n", end) + end + body + SECOND

    n = b"Content-Length: %d" % len(body)
    chunks = b"d\r\n" + body + b"\r\n0\r\n\r\n"
    te = b"Transfer-Encoding: chunked"
    return {
        "two lengths": post(n, b"Content-Length: 5"),
        "two lengths in one": post(n + b", 5"),
        "length and chunks": post(b"Content-Length: 4", te, body=chunks),
        "chunks and length": post(te, b"Content-Length: 4", body=chunks),
        "plus": post(b"Content-Length: +13"),
        "minus": post(b"Content-Length: -1"),
        "hexadecimal length": post(b"Content-Length: 0xd"),
        "space before the colon": post(b"Transfer-Encoding : chunked", body=chunks),
        "unknown coding": post(b"Transfer-Encoding: xchunked", body=chunks),
        "folded": post(n, b"X: a\r\n b"),
        "bare LF": post(n, end=b"\n"),
        "nul in the path": post(n, path=b"/health%00"),
        "chunk of no number": post(te, body=b"zz\r\n" + body + b"\r\n0\r\n\r\n"),
        "chunk of 2^64": post(te, body=b"10000000000000000\r\n"),
    }


NOT_HTTP = {  # 400, or the end of the connection without a word
    "TLS": bytes.fromhex("16030100f4010000f00303") + bytes(range(200)),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "noise": bytes(random.Random(7).randbytes(3000)) + b"\r\n\r\n",
    "a header of 1 MB": b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n",
    "a path of 1 MB": b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
}


def contents(c):
    """{name: (bytes, statuses)}: well-formed requests whose content is wrong."""
    def post(body, *more, path="/v1/embeddings"):
        return c.request(path, body, *more)

    bomb = gzip.compress(bytes(40 << 20), 1)
    wrong = {
        "JSON": post(b'{"input": ["x"'), "JSON that nests": post(b"[" * 200000),
        "nul behind a number": post(b'{"input": "x", "dimensions": 1\0}'),
        "UTF-16": post('{"input": "x"}'.encode("utf-16")), "not UTF-8": post(b'{"input": "\xff"}'),
        "a lone surrogate": post(b'{"input": ["x", "\\ud800"]}'), "no input": post({}),
        "a number": post({"input": 3}), "dimensions": post({"input": "x", "dimensions": 0}),
        "an empty list": post({"input": []}), "too many": post({"input": ["x"] * 3000}),
        "an id too high": post({"input": [[1 << 30]]}), "ids of others": post({"input": [[5, 6]]}),
        "too long": post({"input": "word " * 100000}), "a key": post({"imput": "x"}),
        "broken gzip": post(b"\x1f\x8b" + bytes(50), "Content-Encoding: gzip"),
    }
    table = {name: (data, {400}) for name, data in wrong.items()}
    table |= {
        "model": (post({"input": "x", "model": "nobody"}), {404}),
        "path": (post({}, path="/v1/nothing"), {404}),
        "bomb": (post(bomb, "Content-Encoding: gzip"), {400, 413}),
        "5 MB": (post(b" " * (5 << 20)), {413}),
        "type": (head("/v1/embeddings", 1, *c.auth, "X: 1").replace(
            b"application/json", b"text/xml") + b"x", {415}),
        "method": (c.request("/v1/embeddings", b"", method="GET"), {405}),
    }
    if c.server.key:
        table["no key"] = (head("/v1/embeddings", 2) + b"{}", {401})
        table["a wrong key"] = (head("/v1/embeddings", 2, "Authorization: Bearer x") + b"{}", {401})
    return table


def answers_until_closed(c, data, most=3):
    """All answers to these bytes, and whether the server then closed the connection."""
    answers = []
    with c.connect() as s:
        with contextlib.suppress(ConnectionError):  # it may refuse before it has read all
            s.sendall(data)
        r = Reader(s)
        r.until = time.monotonic() + GUARD
        try:
            while len(answers) < most:
                answers.append(r.answer())
        except Closed as e:
            if e.got:
                raise Loss("whole answers", e.got) from None
            return answers, True
    return answers, False


def refused(c):
    """Sends something that must be refused. Returns (kind, outcome)."""
    kind = c.rng.choice(["framing", "framing", "not HTTP", "content", "content", "content"])
    if kind == "content":
        c.wrong = c.wrong or list(contents(c).items())
        name, (data, allowed) = c.rng.choice(c.wrong)
        c.sent = data
        try:
            with c.connect() as s:
                with contextlib.suppress(ConnectionError):
                    s.sendall(data)
                answer = Reader(s).answer()
        except Closed:  # of a body that is too long to be read, the answer may get lost on its way
            if len(data) < 1 << 20:
                raise
            return f"content: {name}", "closed"
    else:
        names = framings(c.server.key) if kind == "framing" else NOT_HTTP
        name = c.rng.choice(list(names))
        c.sent = names[name]
        answers, closed = answers_until_closed(c, c.sent)
        if kind == "not HTTP" and not answers and closed:
            return f"not HTTP: {name}", "closed"
        allowed = {400, 413, 501} if kind == "framing" else {400, 404, 405, 413, 414, 431, 505}
        if len(answers) != 1 or not closed:
            raise Loss(f"{name}: one answer and the end", [a[0] for a in answers])
        answer = answers[0]
    status, headers, body = answer
    busy = refusal(answer, c.server.documented)
    if status not in allowed and not busy:
        raise Loss(f"{name}: {sorted(allowed)}", (status, body[:200]))
    if "error" not in json.loads(body or b"null"):
        raise Loss(f"{name}: an error in JSON", (status, headers, body[:200]))
    return f"{kind}: {name}", busy or f"{status}"


def hostile_client(c, stop, pause=0.02):
    while not stop.wait(pause):
        began = c.account.now()
        try:
            kind, outcome = refused(c)
            c.account.add(c.server.name, kind, outcome)
            continue
        except (Closed, ConnectionError) as e:
            faults = MAY_BE_CLOSED.intersection(c.account.active(c.server.name, began))
            if faults:
                c.account.add(c.server.name, "hostile", f"closed: {min(faults)}")
                continue
            error = Loss("a refusal", e)
        except TimeoutError:
            error = Loss(f"a refusal, or the end, in {GUARD} s", "neither")
        except (Loss, ValueError, TypeError) as e:
            error = e
        c.account.lose(c.server.name, "hostile", error, c.sent)
        time.sleep(0.5)


# ---- hostile clients: what is held ---------------------------------------------------------------


def leaver(c):
    """Leaves behind work that nobody waits for."""
    n = len(c.oracle.texts)
    texts = [c.oracle.texts[c.rng.randrange(n)] for _ in range(50)]
    with c.connect() as s:
        s.sendall(c.request("/v1/embeddings", {"input": texts}))
        time.sleep(c.rng.choice([0, 0.01, 0.1]))
    return "left"


def partial(c):
    """Part of a header or a body, then the end, or only the sending half's."""
    data = c.request("/v1/embeddings", {"input": "never whole"})
    s = c.connect()
    try:
        s.sendall(data[:c.rng.randrange(1, len(data) - 1)])
        if c.rng.random() < 0.5:
            return "left"
        s.shutdown(socket.SHUT_WR)
        s.settimeout(GUARD)
        with contextlib.suppress(ConnectionError):
            while s.recv(65536):
                pass
        return "closed"
    finally:
        s.close()


def dripper(c):
    """A byte a second of a header that never ends: the server must end it."""
    s = c.connect()
    try:
        s.setblocking(False)
        until = time.monotonic() + GUARD
        for byte in b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1000:
            if time.monotonic() > until:
                raise Loss(f"the end in {GUARD} s", "a connection that is still open")
            with contextlib.suppress(BlockingIOError):
                s.send(bytes([byte]))
            with contextlib.suppress(BlockingIOError):
                if not s.recv(4096):
                    return "closed"
            time.sleep(1)
    except ConnectionError:
        return "closed"
    finally:
        s.close()


def never_reader(c):
    """Asks for a large answer and does not read it."""
    texts = c.oracle.texts[:200] * 5
    with c.connect(receive=4096) as s:
        s.sendall(c.request("/v1/embeddings", {"input": texts}))
        time.sleep(c.rng.uniform(0.5, 2) * c.server.patience)
    return "left"


HOLDERS = {leaver: 6, partial: 6, dripper: 1, never_reader: 1}


def holder_client(c, stop, pause=0.1):
    names, weights = list(HOLDERS), list(HOLDERS.values())
    while not stop.wait(pause):
        kind = c.rng.choices(names, weights)[0]
        try:
            c.account.add(c.server.name, kind.__name__, kind(c))
        except ConnectionError:
            c.account.add(c.server.name, kind.__name__, "closed")
        except (Loss, TimeoutError) as e:
            c.account.lose(c.server.name, kind.__name__, e, c.sent)


def start_clients(server, account, stop, seed):
    """The threads of all clients of a server."""
    jobs = [(good_client, (GOOD,)) for _ in range(5)] + [(good_client, ({health: 1}, 0.25))]
    jobs += [(good_client, ({kind: 1},)) for kind in STEADY]
    jobs += [(hostile_client, ()), (holder_client, ()), (holder_client, ())]
    threads = []
    for i, (job, more) in enumerate(jobs):
        c = Client(server, account, f"{seed} {server.name} {i}")
        threads.append(threading.Thread(target=job, args=(c, stop, *more), daemon=True,
                                        name=f"{server.name} {job.__name__} {i}"))
        threads[-1].start()
    return threads
