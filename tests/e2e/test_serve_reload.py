"""qemb-serve and its model's files: one that is written over, truncated or replaced, reloads by
SIGHUP and by /admin/reload, and the signals that neither end nor reload. tests/e2e/
test_model_changes.py has the pipe's part."""
import base64
import http.client
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from helpers import SMALL, change_weights, wait_for, write_over
from serve_client import BUSY, GUARD, JSON, Server, qemb, server, slow_request

KEY = {**JSON, "Authorization": "Bearer secret"}


@pytest.fixture
def model(tmp_path):
    """A copy whose time of modification is long past: two changes within a tick of the file
    system's clock look alike."""
    return copy(SMALL, tmp_path / "small.qemb")


@pytest.fixture
def other(tmp_path):
    return change_weights(SMALL, tmp_path / "other.qemb")


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("secret\n")
    path.chmod(0o600)
    return path


def copy(source, to):
    shutil.copy(source, to)
    os.utime(to, (10**9, 10**9))
    return to


def replace(model, by):
    """mv: the path names another file, and who has the old one open keeps it."""
    shutil.copy(by, f"{model}.new")
    os.rename(f"{model}.new", model)


def damage(model):
    """Changes a number in the middle, of a matrix: those have no checksum that opening looks at."""
    write_over(model, b"\x01", Path(model).stat().st_size // 2)


def vector(model, text="two"):
    """The vector in the encoding of the server's base64, computed by ./qemb."""
    import numpy as np

    line = qemb(records=[{"text": text}], model=str(model))[0]
    return base64.b64encode(np.array(json.loads(line), "<f4").tobytes()).decode()


def holds(s):
    """The maps of model files, descriptors and threads of the server."""
    proc = Path(f"/proc/{s.process.pid}")
    maps = (proc / "maps").read_text().count(".qemb")
    return maps, len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))


def reload(s):
    """By SIGHUP. Returns when it has ended, and how. Metrics say it: a log may lose lines."""
    counts = lambda: [s.metric(f"qemb_{x}_total") for x in ("reloads", "reload_failures")]
    done = counts()
    s.process.send_signal(signal.SIGHUP)
    wait_for(lambda: counts() != done, GUARD)
    return "reloaded" if counts()[0] > done[0] else "reload_failed"


# ---- a file that is written over -----------------------------------------------------------------


@pytest.mark.parametrize("cache", [0, 64])
def test_no_vector_after_a_write_until_a_reload(model, other, cache):
    old, new = vector(model), vector(other)
    assert old != new
    with server("--cache", cache, model=model) as s:
        assert s.embed(["two"]) == [old]
        write_over(model, Path(other).read_bytes())
        a = s.post({"model": "small", "input": "three", "encoding_format": "base64"})
        assert a.status == 503 and a.error["code"] == "model_changed"  # noticed after its batch
        assert a.error["type"] == "server_error" and int(a.headers["Retry-After"]) > 0
        for path in ("/v1/embeddings", "/tokenize"):
            a = s.post({"model": "small", "input": "two"}, path)
            assert a.status == 503 and a.error["code"] == "model_changed"  # also what is cached
        health = s.request("GET", "/health")
        assert health.status == 503
        assert health.json["status"] == "model_changed" and "written to" in health.json["reason"]
        line = s.wait_log("model_changed")
        assert line["role"] == "main" and line["message"].startswith(str(model))
        assert s.metric("qemb_model_changes_total") == 1 and s.metric("qemb_healthy") == 0
        assert reload(s) == "reloaded"
        assert s.embed(["two"]) == [new]
        assert s.request("GET", "/health").json == {"status": "ok"}
    assert len(s.of["model_changed"]) == 1


def test_a_write_is_noticed_without_requests(model):
    with server(model=model) as s:
        os.utime(model)
        s.wait_log("model_changed")
        assert s.request("GET", "/health").status == 503
        shutil.copy(SMALL, model)
        assert reload(s) == "reloaded" and s.embed(["two"]) == [vector(SMALL)]


def test_a_replaced_file_stays_in_use(model, other):
    old = vector(model)
    with server("--cache", 0, model=model) as s:
        replace(model, other)
        time.sleep(0.3)  # three ticks, in which the server looks at its file
        assert s.embed(["two"]) == [old] and s.request("GET", "/health").status == 200
        os.remove(model)
        time.sleep(0.3)
        assert s.embed(["two"]) == [old]
    assert len(s.of["model_changed"]) == 0


def test_the_fallback_takes_over_where_a_request_allows_it(model, tmp_path):
    fallback = copy(SMALL, tmp_path / "second.qemb")
    with server("--cache", 0, "--fallback", fallback, model=model) as s:
        s.wait_log("ready", 2)
        damage(model)
        s.wait_log("model_changed")
        a = s.post({"model": "small", "input": "two", "fallback": True})
        assert a.status == 200 and a.json["model"] == "second"
        assert s.post({"model": "small", "input": "two"}).error["code"] == "model_changed"
        assert s.post({"model": "second", "input": "two"}).status == 200
        assert reload(s) == "reloaded"  # the same file, with another number
        assert s.post({"model": "small", "input": "two"}).json["model"] == "small"


def test_a_truncated_file_ends_the_server_with_a_line(model):
    """Or it is noticed before anything behind the end is read; then the server goes on."""
    s = Server("--cache", 0, *BUSY, model=model)
    statuses = []

    def ask():
        try:
            statuses.append(s.post(slow_request(40)).status)
        except (OSError, http.client.HTTPException):
            pass  # the server has ended

    asks = threading.Thread(target=ask)
    asks.start()
    s.wait_metric("qemb_queue_requests", lambda n: n > 0)
    os.truncate(model, 4096)
    wait_for(lambda: s.process.poll() is not None or len(s.of["model_changed"]), GUARD)
    s.process.send_signal(signal.SIGTERM)
    status = s.process.wait(GUARD)
    s.reader.join(GUARD)
    asks.join()
    text = b"".join(s.raw)
    assert statuses in ([], [503])
    assert status == 2 and b"truncated while it was in use" in text or \
        status == 0 and b"model_changed" in text, text


# ---- reloads -------------------------------------------------------------------------------------


def test_sighup_loads_the_file_that_is_there(model, other):
    old, new = vector(model), vector(other)
    with server(model=model) as s:
        before = s.post({"model": "small", "input": "two", "encoding_format": "base64"})
        created = s.request("GET", "/v1/models").json["data"][0]["created"]
        fingerprint = s.wait_log("loaded")["fingerprint"]
        replace(model, other)
        assert reload(s) == "reloaded"
        after = s.post({"model": "small", "input": "two", "encoding_format": "base64"})
        assert before.json["data"][0]["embedding"] == old  # not cached under the new model's key
        assert after.json["data"][0]["embedding"] == new
        assert before.headers["x-qemb-fingerprint"] != after.headers["x-qemb-fingerprint"]
        now = s.wait_log("loaded", 2)["fingerprint"]
        assert now != fingerprint
        info = [dict(k[1]) for k in s.metrics() if k[0] == "qemb_model_info"]
        assert [i["fingerprint"] for i in info] == [now]
        assert s.request("GET", "/v1/models").json["data"][0]["created"] >= created
        assert s.metric("qemb_reloads_total") == 1
        s.wait_log("retired")
        replace(model, SMALL)  # and back: what was cached is right again
        assert reload(s) == "reloaded"
        assert s.embed(["two"]) == [old]


def test_a_file_that_cannot_be_opened_changes_nothing(model, tmp_path):
    old = vector(model)
    bad = tmp_path / "bad.qemb"
    bad.write_bytes(b"no model" * 1000)
    with server("--cache", 0, model=model) as s:
        replace(model, bad)
        assert reload(s) == "reload_failed"
        assert str(model) in s.wait_log("reload_failed")["message"]
        assert s.embed(["two"]) == [old]
        replace(model, Path(SMALL).parents[1] / "golden/reranker.qemb")
        os.remove(model)
        assert reload(s) == "reload_failed"
        assert s.embed(["two"]) == [old] and s.request("GET", "/health").status == 200
        assert s.metric("qemb_reload_failures_total") == 2
        assert s.metric("qemb_reloads_total") == 0
        replace(model, SMALL)
        assert reload(s) == "reloaded" and s.embed(["two"]) == [old]


def test_a_file_whose_options_do_not_fit_is_refused(model, tmp_path):
    """Its shape is read before the old model is given up."""
    with server("--max-tokens", 2000, model=model) as s:
        replace(model, Path(SMALL).parents[1] / "golden/hf-tiny.qemb")  # takes 200 tokens
        assert reload(s) == "reload_failed"
        assert s.post({"model": "small", "input": "two"}).status == 200


def test_all_models_are_loaded_again(model, other, tmp_path):
    golden = Path(SMALL).parents[1] / "golden"
    fallback, reranker = tmp_path / "second.qemb", tmp_path / "ranks.qemb"
    copy(SMALL, fallback), copy(golden / "reranker.qemb", reranker)
    with server("--fallback", fallback, "--reranker", reranker, model=model) as s:
        for n in (1, 2, 3):
            s.wait_log("ready", n)
        replace(fallback, other)
        assert reload(s) == "reloaded"
        a = s.post({"model": "second", "input": "two", "encoding_format": "base64"})
        assert a.json["data"][0]["embedding"] == vector(other)
        assert s.embed(["two"]) == [vector(SMALL)]
        ranked = s.post({"query": "a", "documents": ["b"]}, "/v1/rerank")
        assert ranked.status == 200
        replace(reranker, SMALL)  # not of its kind
        assert reload(s) == "reload_failed"
        assert "--reranker" in s.wait_log("reload_failed")["message"]
        assert s.post({"query": "a", "documents": ["b"]}, "/v1/rerank").json["results"] == \
            ranked.json["results"]


def test_admin_reload(model, other, keys, tmp_path):
    with server("--api-key-file", keys, model=model) as s:
        a = s.post(b"", "/admin/reload", {})
        assert a.status == 401 and a.error["code"] == "invalid_api_key"
        assert s.request("GET", "/admin/reload", headers=KEY).status == 405
        replace(model, other)
        a = s.post(b"", "/admin/reload", KEY)
        assert a.status == 200 and a.json["status"] == "reloaded"
        assert a.json["fingerprints"] == {"main": s.wait_log("loaded", 2)["fingerprint"]}
        got = s.post({"model": "small", "input": "two", "encoding_format": "base64"}, headers=KEY)
        assert got.json["data"][0]["embedding"] == vector(other)
        os.remove(model)
        a = s.post(b"{}", "/admin/reload", KEY)
        assert a.status == 500 and a.error["code"] == "reload_failed"
        assert a.reason == "Internal Server Error"
        assert str(model) in a.error["message"]
        assert s.post({"model": "small", "input": "two"}, headers=KEY).status == 200
    with server(model=other) as s:  # without keys anybody could
        a = s.post(b"", "/admin/reload")
        assert a.status == 403 and a.error["code"] == "admin_disabled"
        assert a.reason == "Forbidden"
    assert len(s.of["reloading"]) == 0


def test_one_reload_at_a_time(model, keys):
    statuses = []
    with server("--api-key-file", keys, model=model) as s:
        def ask():
            a = s.post(b"", "/admin/reload", KEY)
            assert a.reason == {200: "OK", 409: "Conflict"}[a.status]
            statuses.append(a.status)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(statuses) == 6 and set(statuses) <= {200, 409}
        s.wait_log("retired", statuses.count(200))
        assert statuses.count(200) == len(s.of["reloaded"]) > 0


def test_the_server_can_end_while_it_reloads(model, keys):
    statuses = []
    with server("--api-key-file", keys, model=model) as s:
        ask = threading.Thread(
            target=lambda: statuses.append(s.post(b"", "/admin/reload", KEY).status))
        ask.start()
        s.wait_log("reloading")
        s.process.send_signal(signal.SIGTERM)
        ask.join()
    assert statuses in ([200], [503])  # it may have been done by then


def test_nothing_is_lost_while_models_change(model, other):
    """Every answer is one model's, to the bit, with that model's fingerprint."""
    texts = [f"text {i}" for i in range(12)]
    wanted, prints, wrong, done = {}, {}, [], [0]
    for path in (SMALL, other):
        wanted[path] = [vector(path, t) for t in texts]
    stop = threading.Event()
    with server("--cache", 1, "--http-threads", 3, model=model) as s:
        for n, path in enumerate((SMALL, other), 1):
            replace(model, path)
            assert reload(s) == "reloaded"
            s.wait_log("retired", n)
            prints[s.post({"model": "small", "input": "x"}).headers["x-qemb-fingerprint"]] = path

        def client(first):
            c, n = s.connect(), first
            while not stop.is_set():
                some = [(n + i) % len(texts) for i in range(3)]
                body = {"model": "small", "input": [texts[i] for i in some],
                        "encoding_format": "base64"}
                c.request("POST", "/v1/embeddings", json.dumps(body), JSON)
                a = c.getresponse()
                got = json.loads(a.read())
                n, done[0] = n + 1, done[0] + 1
                path = prints.get(a.getheader("x-qemb-fingerprint"))
                if a.status != 200 or [e["embedding"] for e in got["data"]] != \
                        [wanted[path][i] for i in some]:
                    wrong.append((a.status, path, got))
            c.close()

        before = holds(s)
        threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for i in range(6):
            replace(model, (SMALL, other)[i % 2])
            assert reload(s) == "reloaded"
        stop.set()
        for t in threads:
            t.join()
        assert not wrong, wrong[:3]
        assert done[0] > 20
        wait_for(lambda: all(now <= was for now, was in zip(holds(s), before)), GUARD)
        assert s.metric("qemb_reloads_total") == 8


def test_requests_under_way_finish_on_the_old_model(model, other):
    answers = []
    with server("--cache", 0, *BUSY, model=model) as s:
        body = slow_request(40, encoding_format="base64")
        old = s.post({"model": "small", "input": [body["input"][0]]}).headers["x-qemb-fingerprint"]
        ask = threading.Thread(target=lambda: answers.append(s.post(body)))
        ask.start()
        s.wait_metric("qemb_queue_requests", lambda n: n > 0)
        replace(model, other)
        assert reload(s) == "reloaded"
        new = s.post({"model": "small", "input": [body["input"][0]]}).headers["x-qemb-fingerprint"]
        ask.join()
        s.wait_log("retired")
    assert answers[0].status == 200 and answers[0].headers["x-qemb-fingerprint"] == old != new


# ---- signals -------------------------------------------------------------------------------------


def test_signals_that_are_ignored(model):
    with server(model=model) as s:
        for n, sig in enumerate((signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM), 1):
            s.process.send_signal(sig)
            assert s.wait_log("signal_ignored", n)["signal"] == sig
        assert len(s.embed(["two"])) == 1


def test_sigquit_drains(model):
    with server(model=model) as s:
        s.process.send_signal(signal.SIGQUIT)
        s.wait_log("draining")
        s.process.send_signal(signal.SIGHUP)  # does not end the drain
        assert s.wait_log("stopped")["signal"] == signal.SIGQUIT
