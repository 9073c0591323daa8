#!/usr/bin/env python3
"""The whole program on the CUDA table against the same program on the CPU's.

    test_cuda_program.py QEMB-CUDA QEMB-CPU

QEMB-CUDA is the emulated build, or the real one on a machine with a GPU. One run with the demo model:
records of all kinds in, the same records out, vectors within the bound of test_cuda_model.cu.
"""
import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/demo.qemb"
MIN_COSINE = 0.99998  # derived in test_cuda_model.cu


def records():
    texts = (ROOT / "models/demo.txt").read_text(encoding="utf-8").splitlines()[:12] + ["", "same", "same", "x" * 300]
    for i, text in enumerate(texts):
        yield {"id": i, "text": text}
    yield {"id": "query", "text": "what?", "instruct": "Find an answer"}
    yield {"id": "short", "text": "four numbers", "dim": 4}
    yield {"id": "bad", "text": 5}


def run(program, *args, stdin=None):
    r = subprocess.run([program, *args], input=stdin, capture_output=True, text=True, timeout=600, check=False)
    return r.returncode, [json.loads(line) for line in r.stdout.splitlines()], r.stderr


def cosine(a, b):
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms


def main(cuda, cpu):
    stdin = "".join(json.dumps(r) + "\n" for r in records())
    # --batch-tokens: several batches, the emulation is slow with long ones
    args = ("-m", str(MODEL), "--input", "jsonl", "--output", "jsonl", "--batch-tokens", "256", "--threads", "1")
    got, want = run(cuda, *args, stdin=stdin), run(cpu, *args, stdin=stdin)
    assert got[0] == want[0] == 3, (got[0], want[0], got[2])  # 3: one record is bad
    assert len(got[1]) == len(want[1]) == stdin.count("\n"), (len(got[1]), len(want[1]))
    worst = 1.0
    for g, w in zip(got[1], want[1], strict=True):
        a, b = g.pop("embedding", None), w.pop("embedding", None)
        assert g == w, (g, w)
        if a is None:
            assert b is None and "error" in g, g
            continue
        assert len(a) == len(b) and all(map(math.isfinite, a)), g
        c = cosine(a, b)
        worst = min(worst, c)
        assert c >= MIN_COSINE, (g, c)
    print(f"program: {len(got[1])} records as from the CPU, least cosine {worst:.7f}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
