"""tests/soak, whose runs take minutes: that what a server must not do counts as lost, and that what
it may do does not."""
import json
import re
import socket
import sys
import threading

import pytest
from helpers import GUARD, QEMB, ROOT, SMALL

sys.path.insert(0, str(ROOT / "tests" / "soak"))
import account as accounts  # noqa: E402
import pipe_client as pipe  # noqa: E402
import report  # noqa: E402
import soak  # noqa: E402
import traffic  # noqa: E402

TEXTS = [f"text {i}" for i in range(8)]


@pytest.fixture(scope="module")
def oracle():
    return traffic.Oracle(QEMB, SMALL, TEXTS)


def answer(status, body, *headers):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(text)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + text


class Fake:
    """A server that says the same to everyone, and then closes, or not."""

    name, key, patience, documented = "fake", None, 1, {"queue_full"}

    def __init__(self, oracle, said, closes=True):
        self.oracle, self.said, self.closes, self.held = oracle, said, closes, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                s, _ = self.listener.accept()
            except OSError:
                return
            s.settimeout(GUARD)
            s.recv(1 << 20)
            s.sendall(self.said)
            if self.closes:
                s.shutdown(socket.SHUT_WR)
            self.held.append(s)  # closed later: unread bytes would reset the connection


def ask(server, kind, run=traffic.run_good):
    """What one request counts as."""
    a = accounts.Account()
    c = traffic.Client(server, a, 1)
    try:
        run(c, kind)
    finally:
        c.keep(None)
        server.listener.close()
        for s in server.held:
            s.close()
    (outcome, n), = a.outcomes["fake", kind.__name__].items()
    assert n == 1 and a.n_losses == len(a.losses) == (outcome == "LOST")
    return outcome


def the_text(c):
    """A good request that is always the same."""
    want = c.oracle.full[TEXTS[3]]
    body = {"input": TEXTS[3], "encoding_format": "base64"}
    return traffic.expect(c, c.exchange(c.request("/v1/embeddings", body)),
                          lambda b: json.loads(b)["data"][0]["embedding"] == want)


def vectors(*texts, oracle):
    return {"data": [{"embedding": oracle.full[t]} for t in texts]}


def error(code):
    return {"error": {"code": code}}


def test_right_bits_and_documented_refusals_are_no_loss(oracle):
    right = answer(200, vectors(TEXTS[3], oracle=oracle))
    assert ask(Fake(oracle, right), the_text) == "right"
    refused = answer(429, error("queue_full"), "Retry-After: 1")
    assert ask(Fake(oracle, refused), the_text) == "refused: 429 queue_full"


@pytest.mark.parametrize("said", [
    pytest.param(lambda o: answer(200, vectors(TEXTS[4], oracle=o)), id="another text's bits"),
    pytest.param(lambda o: answer(200, b'{"data": []}'), id="no vector"),
    pytest.param(lambda o: answer(200, vectors(TEXTS[3], oracle=o))[:-5], id="cut"),
    pytest.param(lambda o: b"", id="nothing"),
    pytest.param(lambda o: answer(500, error("x")), id="500"),
    pytest.param(lambda o: answer(503, error("queue_full")), id="no Retry-After"),
    pytest.param(lambda o: answer(503, error("tired"), "Retry-After: 1"), id="not documented"),
    pytest.param(lambda o: answer(429, b"<html>", "Retry-After: 1"), id="not JSON"),
])
def test_anything_else_is_lost(oracle, said):
    assert ask(Fake(oracle, said(oracle)), the_text) == "LOST"


def test_no_answer_is_lost(oracle, monkeypatch):
    monkeypatch.setattr(traffic, "GUARD", 0.2)
    assert ask(Fake(oracle, b"", closes=False), the_text) == "LOST"


def test_a_closed_connection_is_allowed_in_some_faults(oracle):
    def in_flood(c, kind):
        window = c.account.opens("flood", "fake")
        c.account.closes(window)
        traffic.run_good(c, kind)

    assert ask(Fake(oracle, b""), the_text, in_flood) == "closed: flood"
    assert ask(Fake(oracle, b"HTTP/1.1 200"), the_text, in_flood) == "LOST"


@pytest.mark.parametrize("said,good", [
    (answer(400, error("invalid_request")), True),
    (answer(400, error("x")) + answer(200, {}), False),  # what was smuggled is answered
    (answer(400, b"<html>"), False), (answer(200, {}), False), (b"", False),
])
def test_smuggling_gets_one_refusal(oracle, monkeypatch, said, good):
    monkeypatch.setattr(traffic.random.Random, "choice",
                        lambda self, xs: "framing" if "framing" in xs else "two lengths")

    def smuggle(c, kind):
        try:
            outcome = traffic.refused(c)
        except (traffic.Loss, traffic.Closed, ValueError) as e:
            c.account.lose("fake", kind.__name__, e)
        else:
            c.account.add("fake", kind.__name__, *outcome[1:])

    assert ask(Fake(oracle, said), traffic.refused, smuggle) == ("400" if good else "LOST")


def test_the_pipes_check_sees_a_wrong_line(oracle):
    rng = traffic.random.Random(2)
    data, want = pipe.make_input(oracle, rng, 60)
    lines = [line.encode() if line else b'{"line": %d, "error": {"code": "x"}}' % i
             for i, line in enumerate(want, 1)]
    assert None in want and len(data.splitlines()) == 60
    pipe.check(lines, want)
    for at in want.index(None), want.index(next(filter(None, want))):
        with pytest.raises((traffic.Loss, ValueError)):
            pipe.check([*lines[:at], lines[at + 1], *lines[at + 1:]], want)


def rows(kib_a_second, burst=0):
    """Ten minutes of samples of a process that grows."""
    return [(t, 20000 + int(kib_a_second * t) + burst * (t % 10 == 5), 9, 9, 9)
            for t in range(600)]


def test_growth_is_the_slope_of_the_lows():
    s = accounts.Samples(accounts.Account(), None)
    for slope, burst in (0, 0), (0, 50000), (2, 0), (2, 50000):
        s.rows = rows(slope, burst)
        assert s.growth(600) == slope * 3600
    assert s.growth(599) is None


def test_the_manuals_refusals_are_found():
    codes = soak.documented_codes()
    assert {"queue_full", "server_overloaded", "deadline_exceeded", "out_of_memory"} <= codes
    assert not {"shutting_down", "loading", "invalid_json", "non_finite"} & codes


def test_publish_replaces_what_was_there(tmp_path):
    for folder in "docs", "bench/results", "out":
        (tmp_path / folder).mkdir(parents=True)
    for name in "soak.svg", "soak.json":
        (tmp_path / "out" / name).write_text(name)
    page = tmp_path / "docs" / "reliability.md"
    page.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    machine = {"cpu": "a CPU", "cpus": 2, "date": "2026-11-29T00:00:00Z", "commit": "abc"}
    for n in 1, 2:
        report.publish(tmp_path, tmp_path / "out",
                       {"seconds": n, "machine": machine, "table": f"table {n}\n"})
    assert re.fullmatch(r"before\n.*\b2 s on a CPU.*table 2\n.*after\n", page.read_text(), re.S)
    assert "table 1" not in page.read_text() and "old" not in page.read_text()
    assert (tmp_path / "docs/soak.svg").exists() and (tmp_path / "bench/results/soak.json").exists()
