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

OPTIONS = ("-m", str(MODEL), "--port", "0", "--batch-tokens", "256", "--threads", "1")
TEXTS = [*(ROOT / "examples/demo.txt").read_text(encoding="utf-8").splitlines()[:3], "", "same",
         "same"]


@contextlib.contextmanager
def server(program, status, **env):
    """The port of a server that is ready, and its log; it has to end with that status."""
    p = subprocess.Popen([program, *OPTIONS], stderr=subprocess.PIPE, text=True,
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
    body = json.dumps({"model": "demo", "input": texts, "encoding_format": "base64"})
    c.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    r = c.getresponse()
    answer = r.status, json.loads(r.read())
    c.close()
    return answer


def floats(s):
    data = base64.b64decode(s)
    return struct.unpack(f"<{len(data) // 4}f", data)


def main(serve, cpu):
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS)
    got = run(cpu, "--output", "json", stdin=lines)
    want = [json.loads(line) for line in got.stdout.splitlines()]
    with server(serve, 0) as (port, _):
        status, body = ask(port, TEXTS)
        assert status == 200, body
        pairs = zip((floats(e["embedding"]) for e in body["data"]), want, strict=True)
        worst = min(cosine(a, b) for a, b in pairs)
        assert worst >= MIN_COSINE, worst
        c = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        c.request("GET", "/metrics")
        metrics = c.getresponse().read().decode()
        c.close()
        assert "\nqemb_clamped_total 0\n" in metrics and "\nqemb_recomputed_total 0\n" in metrics
    print(f"server: {len(TEXTS)} vectors as from the CPU, least cosine {worst:.7f}")
    if b"QEMB_EMU" not in open(serve, "rb").read():
        return
    answers = []

    def client(i):
        for n in range(100):
            answers.append(ask(port, [f"{i} {n}"]))
            if answers[-1][0] != 200:
                return

    with server(serve, 2, QEMB_EMU="fault_after=300") as (port, log):  # past the probe
        threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    last = [body["error"]["code"] for status, body in answers if status != 200]
    assert last == 4 * ["shutting_down"], last
    assert [e["event"] for e in log].count("device_failed") == 1
    print("server: a device that fails is told to every client, and ends it with status 2")


if __name__ == "__main__":
    main(*sys.argv[1:3])
