"""Several devices and two batches in flight, in qemb and qemb-serve.

The programs are linked with tests/unit/fake_gpus.c instead of a backend, and run with the thread
sanitizer, whose reports show as a wrong exit status. tests/cuda has tests with emulated GPUs."""
import json
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import serve_client
from serve_client import JSON, MODEL, ROOT, TINY, Server, server

QEMB = ROOT / "build/tsan/qemb-devices"
SERVE = ROOT / "build/tsan/qemb-serve-devices"
GUARD = 240  # seconds until a run counts as hung
TEXTS = [f"text {i} of many, {'and longer ' * (i % 5)}" for i in range(60)]
BATCHES = ("--batch-tokens", "64", "--threads", "1")


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(serve_client, "SERVE", str(SERVE))
    monkeypatch.setattr(serve_client, "GUARD", GUARD)
    return lambda s: monkeypatch.setenv("FAKE_GPUS", s)


def run(*args, texts=TEXTS):
    stdin = "".join(t + "\n" for t in texts).encode()
    command = [QEMB, "-m", TINY, *BATCHES, "--output", "base64", *args]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=GUARD)


def devices_in(stderr):
    """Returns (device, batches, texts, failed) from the lines of --stats."""
    line = rb"qemb: device (\d+): (\d+) batches, (\d+) distinct texts(, failed)?\n"
    return [(int(d), int(b), int(t), bool(f)) for d, b, t, f in re.findall(line, stderr)]


# ---- qemb ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", ("1", "0,1", "3,0", "all"))
def test_the_same_vectors_in_the_same_order(gpus, devices):
    gpus("4")
    want, got = run(), run("--devices", devices, "--stats")
    assert got.returncode == want.returncode == 0, got.stderr
    assert got.stdout == want.stdout and got.stdout.count(b"\n") == len(TEXTS)
    seen = devices_in(got.stderr)
    # the sanitized model is slower than the reader, so that full batches are waiting
    closed = re.findall(rb'{"event":"closed","device":(\d),"in_flight":(\d)}\n', got.stderr)
    assert len(closed) == max(1, len(seen)) and (devices, closed) != ("1", [(b"1", b"1")])
    if devices == "1":
        assert not seen and b"qemb: device" not in got.stderr
        return
    used = [0, 1, 2, 3] if devices == "all" else [*map(int, devices.split(","))]
    assert [d for d, *_ in seen] == used
    assert all(b > 0 and t > 0 and not f for _, b, t, f in seen), seen
    batches = int(re.search(rb"(\d+) batches, \d+ distinct texts, \d+ prefix", got.stderr)[1])
    assert sum(b for _, b, _, _ in seen) == batches and sum(t for _, _, t, _ in seen) == len(TEXTS)
    assert b"qemb: %d devices, 0 failed\n" % len(seen) in got.stderr


@pytest.mark.parametrize("batch", (1, 2, 3))
def test_a_device_that_fails(gpus, batch):
    gpus("4")
    want = run().stdout
    gpus(f"4 2 {batch}")
    p = run("--devices", "all", "--stats")
    assert p.returncode == 0 and p.stdout == want, p.stderr
    message = b"qemb: device 2: GPU: collect failed (as told); the other devices take its batches\n"
    assert p.stderr.count(message) == 1 and b"qemb: 4 devices, 1 failed\n" in p.stderr
    assert [(d, f) for d, _, _, f in devices_in(p.stderr)] == [(i, i == 2) for i in range(4)]
    assert devices_in(p.stderr)[2][1] == batch - 1


@pytest.mark.parametrize("devices", ("0", "0,1", "all"))
def test_all_devices_fail(gpus, devices):
    gpus("4")
    want = run().stdout
    gpus("4 -1 2")
    p = run("--devices", devices, "--stats")
    n = 4 if devices == "all" else devices.count(",") + 1
    assert p.returncode == 2 and want.startswith(p.stdout) and p.stdout != want
    assert p.stdout.endswith(b"\n") and p.stdout
    assert p.stderr.count(b"GPU: collect failed (as told)") == n
    assert p.stderr.count(b"; no device is left\n") == (n > 1)


def test_shards_on_several(gpus, tmp_path):
    """A device that fails in one shard has no part in the next ones; if all fail, nothing is left
    of the shard in work."""
    paths = [tmp_path / f"{i}.txt" for i in range(4)]
    for path in paths:
        path.write_text("".join(t + "\n" for t in TEXTS))

    def shards(out):
        command = [QEMB, "shards", "-m", TINY, *BATCHES, "--output", "base64", "--out", out]
        command += ["--devices", "all", "--stats", *paths]
        return subprocess.run(command, capture_output=True, timeout=GUARD)

    gpus("4")
    want = run().stdout
    gpus("4 2 2")
    p = shards(tmp_path / "one")
    assert p.returncode == 0 and b"qemb: 4 shards: 4 made" in p.stderr, p.stderr
    assert p.stderr.count(b"device 2: GPU: collect failed (as told); the other") == 1
    assert [(d, f) for d, _, _, f in devices_in(p.stderr)] == [(i, i == 2) for i in range(4)]
    assert all((tmp_path / "one" / f"{f.name}.base64").read_bytes() == want for f in paths)
    gpus("4 -1 2")
    p = shards(tmp_path / "all")
    assert p.returncode == 2 and b"; no device is left\n" in p.stderr
    names = {f.name for f in (tmp_path / "all").iterdir()}
    assert names <= {f"{f.name}.{ext}" for f in paths[:3] for ext in ("base64", "json")}


def test_gpus_that_take_batches_of_different_sizes(gpus):
    """Of two GPUs the second has no memory for the larger default, so all batches are small."""
    gpus("2")
    texts = [f"{i} {'many words ' * 8}" for i in range(60)]
    command = [QEMB, "-m", TINY, "--threads", "1", "--output", "base64", "--stats", "--devices"]
    stdin = "".join(t + "\n" for t in texts).encode()
    runs = {}
    for devices in ("0", "1", "0,1", "1,0"):
        p = subprocess.run([*command, devices], input=stdin, capture_output=True, timeout=GUARD)
        assert p.returncode == 0, p.stderr
        runs[devices] = p.stdout, int(re.search(rb"(\d+) batches,", p.stderr)[1])
    assert len({out for out, _ in runs.values()}) == 1
    batches = {devices: n for devices, (_, n) in runs.items()}
    assert batches["0"] < batches["1"] == batches["0,1"] == batches["1,0"], batches


def test_rerank_on_several(gpus):
    """The dense layer of two batches in flight, on the host; a record's documents in batches of
    several devices; a device that fails, and all of them."""
    records = [{"query": f"query {i}", "documents": TEXTS[i : 2 * i + 1]} for i in range(12)]
    stdin = "".join(json.dumps(r) + "\n" for r in records).encode()

    def rerank(*args):
        model = ROOT / "tests/fixtures/reranker.qemb"
        command = [QEMB, "rerank", "-m", model, "--batch-tokens", "200", "--threads", "1", *args]
        return subprocess.run(command, input=stdin, capture_output=True, timeout=GUARD)

    gpus("4")
    want = rerank()
    assert want.returncode == 0 and want.stdout.count(b"\n") == 12, want.stderr
    p = rerank("--devices", "all")
    assert (p.returncode, p.stdout) == (0, want.stdout), p.stderr
    gpus("4 2 2")
    p = rerank("--devices", "all")
    assert (p.returncode, p.stdout) == (0, want.stdout) and b"qemb: device 2: GPU" in p.stderr
    gpus("4 -1 3")
    p = rerank("--devices", "0,1")
    assert p.returncode == 2 and want.stdout.startswith(p.stdout) and p.stdout != want.stdout
    assert p.stdout.endswith(b"\n") and b"; no device is left\n" in p.stderr


def test_a_line_gets_its_answer(gpus):
    """A program that writes one line and waits."""
    gpus("2")
    command = [QEMB, "-m", TINY, *BATCHES, "--devices", "0,1", "--output", "base64"]
    p = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    guard = threading.Timer(GUARD, p.kill)
    guard.start()
    for text in TEXTS[:3]:
        p.stdin.write(text.encode() + b"\n")
        p.stdin.flush()
        assert p.stdout.readline() == run(texts=[text]).stdout
    p.stdin.close()
    assert p.wait(GUARD) == 0
    p.stdout.close()
    guard.cancel()


def test_records_without_vectors_keep_their_place(gpus):
    gpus("3")
    lines = [json.dumps({"text": t}) if i % 7 else "{" for i, t in enumerate(TEXTS)]
    json_lines = ("--input", "jsonl", "--output", "jsonl")
    want, got = (run(*json_lines, "--devices", d, texts=lines) for d in ("0", "all"))
    assert got.returncode == want.returncode == 3 and got.stdout == want.stdout


def test_lists_of_devices(gpus):
    gpus("2")
    form = "not a list of GPUs (got {}, want numbers such as 0,2, or all)"
    for devices, message in (
        ("", form.format("")),
        ("0,", form.format("0,")),
        (",0", form.format(",0")),
        ("one", form.format("one")),
        ("0;1", form.format("0;1")),
        ("-1", form.format("-1")),
        ("all,0", form.format("all,0")),
        ("0,1,0", "GPU 0 twice"),
        ("3", "no GPU 3 (got 2 GPUs)"),
        ("0,2", "no GPU 2 (got 2 GPUs)"),
        ("9999", "no GPU 9999 (got 2 GPUs)"),
        ("999999", form.format("999999")),
    ):
        p = run("--devices", devices)
        assert p.returncode == 1 and not p.stdout, devices
        assert p.stderr.startswith(b"qemb: --devices: " + message.encode()), p.stderr
    gpus("1")
    assert b"no GPU 1 (got 1 GPU)" in run("--device", "1").stderr
    assert run("--device", "0", texts=["x"]).returncode == 0  # a prefix of the name
    p = subprocess.run([ROOT / "qemb", "-m", MODEL, "--devices", "0"], capture_output=True)
    assert p.returncode == 1 and b"--devices: only with a GPU (qemb-cuda)" in p.stderr


def test_plan_and_check(gpus):
    gpus("3")

    def command(name, devices):
        command = [QEMB, name, "-m", MODEL, "--devices", devices]
        p = subprocess.run(command, capture_output=True, text=True, timeout=GUARD)
        assert p.returncode == 0, p.stderr
        return p.stdout

    note = "That is GPU 0. The others of --devices may choose other batch sizes.\n"
    assert command("plan", "0,2") == command("plan", "0") + note
    both = command("check", "2,0")
    assert re.findall("device .", both) == ["device 2", "device 0"]
    scores = re.findall(r"q.\.d. .*", both)
    assert len(scores) == 8 and scores[:4] == scores[4:]


# ---- qemb-serve ---------------------------------------------------------------------------------

# Warm-up: 1, 17, 33 and 49 tokens, three times each, and 64 tokens.
SMALL = (*BATCHES, "--name", "small", "--max-tokens", "64", "--cache", "0")
WARM_UP = 13


def ask_all(s, n=60):
    """Asks for texts of n requests from eight connections at a time. Returns their vectors."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda i: s.embed([f"request {i}", f"{i} again"]), range(n)))


def test_serve_two_devices(gpus):
    gpus("2")
    with server(*SMALL, model=TINY) as s:
        want = ask_all(s)
        assert s.metric("qemb_devices") == 1
    with server(*SMALL, "--devices", "0,1", model=TINY) as s:
        warm = [s.wait_log("warmed_up", i) for i in (1, 2)]
        assert {e["device"] for e in warm} == {0, 1}
        assert all(e["batches"] == WARM_UP and e["seconds"] > 0 for e in warm)
        assert s.wait_log("loaded")["devices"] == 2
        events = [e["event"] for e in s.log]
        assert events.index("ready") > events.index("loaded") > events.index("warmed_up")
        assert ask_all(s) == want
        assert s.metric("qemb_devices") == 2 and s.metric("qemb_failed_devices_total") == 0


def test_serve_a_device_that_fails(gpus):
    gpus("3")
    with server(*SMALL, model=TINY) as s:
        want = ask_all(s)
    gpus(f"3 1 {WARM_UP + 3}")
    with server(*SMALL, "--devices", "all", model=TINY) as s:
        assert ask_all(s) == want
        failed = s.wait_log("device_failed")
        assert (failed["device"], failed["working"]) == (1, 2) and "as told" in failed["message"]
        assert s.metric("qemb_devices") == 2 and s.metric("qemb_failed_devices_total") == 1
        assert s.request("GET", "/health").status == 200 and s.metric("qemb_healthy") == 1
        assert s.embed(["after it"])
    assert len(s.of["device_failed"]) == 1


def test_serve_all_devices_fail(gpus):
    gpus(f"2 -1 {WARM_UP + 10}")
    s = Server(*SMALL, "--devices", "all", model=TINY)
    codes = set()

    def client(i):
        for k in range(200):
            try:
                a = s.post({"model": "small", "input": [f"{i} {k}"]}, headers=JSON)
            except OSError:  # after the answers the server ends
                return
            if a.status != 200:
                codes.add((a.status, a.error["code"]))
                return

    clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for c in clients:
        c.start()
    for c in clients:
        c.join()
    assert s.process.wait(GUARD) == 2
    s.reader.join(GUARD)
    s.process.stderr.close()
    assert codes == {(503, "shutting_down")}
    assert [e["working"] for e in s.of["device_failed"]] == [1, 0]


def test_serve_long_requests_on_two_devices(gpus):
    """A request of many batches, which fills two batches in flight on each device."""
    gpus("2")
    texts = [f"{i} {'words ' * (i % 9)}" for i in range(80)]
    with server(*SMALL, model=TINY) as s:
        want = s.embed(texts)
    assert s.log[-2] == {"event": "closed", "device": 0, "in_flight": 2}
    with server(*SMALL, "--devices", "all", model=TINY) as s:
        assert s.embed(texts) == want
    gpus(f"2 0 {WARM_UP + 4}")
    with server(*SMALL, "--devices", "all", model=TINY) as s:
        assert s.embed(texts) == want
        s.wait_log("device_failed")
