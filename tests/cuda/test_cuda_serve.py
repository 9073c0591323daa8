#!/usr/bin/env python3
"""Compares the CUDA server with qemb on the CPU, and tests it with a device that fails.

    test_cuda_serve.py QEMB-SERVE-CUDA QEMB-CPU

QEMB-SERVE-CUDA is the emulated build, or the real one on a machine with a GPU, where only the first
part runs: the emulation's device can be told to fail. """
import base64
import contextlib
import http.client
import json
import os
import struct
import subprocess
import sys
import threading

from test_cuda_program import MIN_COSINE, MODEL, ROOT, cosine, run

# Texts of up to 64 tokens: the server computes one of each padded size before it is ready.
OPTIONS = ("-m", str(MODEL), "--port", "0", "--batch-tokens", "256", "--threads", "1",
           "--max-tokens", "64")
WARM_UP = 13  # batches: 1, 17, 33 and 49 tokens, three times each because of the graphs, and 64
# A device that fails does so after launches, and a batch without graphs has about 23: this is past
# the warm-up, which has 5 batches then, and past the probe.
FAULT = ("--no-graphs", "fault_after=300")
TEXTS = [*(ROOT / "tests/fixtures/small.txt").read_text(encoding="utf-8").splitlines()[:3],
         "", "same", "same"]


@contextlib.contextmanager
def server(program, status, *options, **env):
    """The port of a server that is ready, and its log; it has to end with that status."""
    p = subprocess.Popen([program, *OPTIONS, *options], stderr=subprocess.PIPE, text=True,
                         env={**os.environ, **env})
    try:
        log = []
        while not log or log[-1]["event"] != "ready":
            log.append(json.loads(p.stderr.readline()))
        port = next(e["port"] for e in log if e["event"] == "listening")
        reader = threading.Thread(target=lambda: log.extend(map(json.loads, p.stderr)))
        reader.start()
        yield port, log
        if not status:
            p.terminate()
        assert p.wait(600) == status, (p.returncode, log[-3:])
        reader.join()
    finally:
        p.kill()
        p.stderr.close()


def ask(port, texts):
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = json.dumps({"model": "small", "input": texts, "encoding_format": "base64"})
    c.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    r = c.getresponse()
    answer = r.status, json.loads(r.read())
    c.close()
    return answer


def floats(s):
    data = base64.b64decode(s)
    return struct.unpack(f"<{len(data) // 4}f", data)


def metrics(port):
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    c.request("GET", "/metrics")
    text = c.getresponse().read().decode()
    c.close()
    return text


def ask_often(port, n):
    """The answers to four clients with n requests each; one that gets an error asks no more."""
    answers = []

    def client(i):
        for k in range(n):
            answers.append(ask(port, [f"{i} {k}"]))
            if answers[-1][0] != 200:
                return

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return answers


def check_several(serve):
    emu = f"count=2 fault_device=1 {FAULT[1]}"
    with server(serve, 0, "--devices", "all", FAULT[0], QEMB_EMU=emu) as (port, log):
        answers = ask_often(port, 20)
        text = metrics(port)
    assert [status for status, _ in answers] == 80 * [200]
    assert "\nqemb_devices 1\n" in text and "\nqemb_failed_devices_total 1\n" in text, text
    assert "\nqemb_healthy 1\n" in text
    failed = [(e["device"], e["working"]) for e in log if e["event"] == "device_failed"]
    assert failed == [(1, 1)], log
    warm = {e["device"]: e["batches"] for e in log if e["event"] == "warmed_up"}
    assert warm == {0: 5, 1: 5}, log


def main(serve, cpu):
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS)
    got = run(cpu, "--output", "json", stdin=lines)
    want = [json.loads(line) for line in got.stdout.splitlines()]
    with server(serve, 0) as (port, log):
        status, body = ask(port, TEXTS)
        assert status == 200, body
        pairs = zip((floats(e["embedding"]) for e in body["data"]), want, strict=True)
        worst = min(cosine(a, b) for a, b in pairs)
        assert worst >= MIN_COSINE, worst
        text = metrics(port)
        assert "\nqemb_clamped_total 0\n" in text and "\nqemb_recomputed_total 0\n" in text
    warm = [e["batches"] for e in log if e["event"] == "warmed_up"]
    assert warm == [WARM_UP], log
    print(f"server: {len(TEXTS)} vectors as from the CPU, least cosine {worst:.7f}")
    if b"QEMB_EMU" not in open(serve, "rb").read():
        return
    with server(serve, 2, FAULT[0], QEMB_EMU=FAULT[1]) as (port, log):
        answers = ask_often(port, 100)
    last = [body["error"]["code"] for status, body in answers if status != 200]
    assert last == 4 * ["shutting_down"], last
    assert [e["event"] for e in log].count("device_failed") == 1
    print("server: a device that fails is told to every client, and ends it with status 2")
    check_several(serve)
    print("server: of two devices one fails, and no request notices")


if __name__ == "__main__":
    main(*sys.argv[1:3])
