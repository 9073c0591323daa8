"""Deadlines by the measured rate, and long texts that do not keep others waiting. The queue's part
is tests/unit/test_serve_queue.c, the engine's tests/unit/test_long_text.c.

Nothing here is timed: where a request has to come in the middle of another one's computation, a
test tries again until it does."""

import http.client
import time

import openai
import pytest
from serve_client import (
    BUSY,
    BUSY_CPU,
    GUARD,
    HIDDEN,
    LONG,
    MAX_TOKENS,
    Slow,
    long_ids,
    qemb,
    server,
    slow_request,
)

N = MAX_TOKENS  # of a long text; with less, a busy machine answers the short one too late
STEPS = ("--batch-tokens", 64, *BUSY_CPU, "--cache", 0)
TRIES = 20


def rate_of(s):
    """Tokens a second of all batches."""
    return s.metric("qemb_computed_tokens_total") / s.metric("qemb_batch_seconds_sum")


def begin_long(s, i):
    """Sends a long text and returns when its computation has begun, at the earliest."""
    before = s.metric("qemb_computed_tokens_total")
    slow = Slow(s, 0, input=[long_ids(i, N)], encoding_format="base64", dimensions=HIDDEN)
    until = time.monotonic() + GUARD
    while time.monotonic() < until:
        m = {name: value for (name, labels), value in s.metrics().items() if not labels}
        begun = m["qemb_queue_requests"] and not m["qemb_queue_texts"]
        if begun or m["qemb_computed_tokens_total"] > before:
            return slow
    raise AssertionError("the text is not computed")


def test_short_texts_pass_a_long_one():
    """A short request is answered before the long text is computed, and both have the bits that
    ./qemb gives them."""
    passed = 0
    with server(*STEPS) as s:
        for i in range(TRIES):
            before = s.metric("qemb_computed_texts_total")
            slow = begin_long(s, i)
            short = s.embed([f"short {i}"])
            passed += s.metric("qemb_computed_texts_total") == before + 1
            answer = slow.wait()
            assert answer.status == 200
            if passed:
                break
        assert passed, "no short text was answered before the long one was computed"
        records = [{"ids": long_ids(i, N)}, {"text": f"short {i}"}]
        want = qemb("--output", "base64", *BUSY_CPU, records=records)
        assert [answer.json["data"][0]["embedding"], *short] == want


def test_a_long_text_is_given_up_when_its_client_leaves():
    with server(*STEPS) as s:
        given_up = 0
        for i in range(TRIES):
            slow = begin_long(s, 100 + i)
            computed = s.metric("qemb_computed_tokens_total")
            slow.leave()
            s.wait_metric("qemb_queue_requests", lambda x: x == 0)
            s.embed([f"after {i}"])
            # a text that was done before its client left was counted with its tokens
            given_up = s.metric("qemb_given_up_total")
            if given_up:
                assert s.metric("qemb_computed_tokens_total") < computed + N
                break
        assert given_up == 1
        # another client may ask for the same text
        answer = begin_long(s, 100 + i).wait()
        assert answer.status == 200 and s.metric("qemb_departed_total") >= 1


def test_a_long_text_ends_with_the_server():
    with server(*STEPS, "--drain", 0) as s:
        slow = begin_long(s, 200)
    try:
        assert slow.wait().status in (200, 503)
    except (http.client.HTTPException, ConnectionError):
        pass  # the server was gone before it could answer


@pytest.fixture(scope="module")
def rate():
    """Tokens a second of this machine, roughly."""
    with server(*BUSY) as s:
        assert Slow(s, 3).wait().status == 200
        return rate_of(s)


def test_what_was_begun_does_not_expire(rate):
    """The first request is taken whatever its size, since no rate is known, and is answered long
    after its deadline."""
    with server(*BUSY, "--deadline", 1) as s:
        answer = Slow(s, int(3 * rate / LONG) + 2).wait()
        assert answer.status == 200
        assert s.metric("qemb_request_seconds_sum") > 1
        assert s.metric("qemb_expired_total") == 0


def test_what_cannot_be_done_in_time_is_refused(rate):
    with server(*BUSY, "--deadline", 2, "--max-queue", 10**7, "--max-texts", 10**5,
                "--max-body", 10**5) as s:  # fmt: skip
        assert Slow(s, 3).wait().status == 200  # from here on a rate is known

        # Ten times what can be done: 413, which OpenAI's client does not send again.
        too_many = slow_request(int(20 * max(rate, rate_of(s)) / LONG) + 10, 1000)
        answer = s.post(too_many)
        assert answer.status == 413 and answer.error["code"] == "too_slow"
        assert answer.error["param"] == "input" and "Retry-After" not in answer.headers
        for word in "send fewer texts", "tokens/s", "--deadline", "at most 2 s":
            assert word in answer.error["message"]
        with pytest.raises(openai.APIStatusError) as e:
            s.openai(max_retries=5).embeddings.create(model="small", input=too_many["input"])
        assert e.value.status_code == 413
        assert s.metric("qemb_refused_total") == 2

        # Each alone could be done in a seventh of the time, all of them not: 429.
        n = max(1, int(0.3 * rate_of(s) / LONG))
        many = [Slow(s, n, 20000 + 1000 * i) for i in range(40)]
        answers = [x.wait() for x in many]
        refused = [a for a in answers if a.status != 200]
        assert 0 < len(refused) < len(answers)
        for a in refused:
            assert (a.status, a.error["code"]) in ((429, "too_slow"), (503, "deadline_exceeded"))
            assert int(a.headers["Retry-After"]) >= 1
        message = next(a.error["message"] for a in refused if a.status == 429)
        assert "retry later" in message and "tokens/s" in message and "at most 2 s" in message

        # the client retries after Retry-After
        assert s.openai(max_retries=9).embeddings.create(model="small", input="afterwards").data
