#!/usr/bin/env python3
"""What qemb-cuda does on this machine's GPU: ceilings, kernels, products, whole runs, memory.

    bench_gpu.py [--shape 0.6B|4B|8B ...] [--sentence-transformers] [--out DIR]

Models of the real shapes with random weights are made on the spot and kept under build/bench (their
speed is the real ones'). Prints tables and writes bench/results/GPU-COMMIT.json with GPU, driver,
clocks and commit. Every step has a limit of ten minutes. `make gpu-bench` runs it. Without a GPU it says
so and succeeds. --sentence-transformers also times that library on the same weights and texts, if it
is installed.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("QEMB_SHARED", ROOT.parent / "shared"))
PYTHON = ROOT / ".venv/bin/python"
LENGTHS = {16: 40000, 32: 20000, 64: 10000, 128: 5000, 512: 1200}  # tokens: texts of a run
LIMIT = 600


def ask(*command):
    try:
        r = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return r.stdout.strip().splitlines()[0] if r.returncode == 0 and r.stdout.strip() else ""


def machine():
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit")
    values = ask("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").split(", ")
    return dict(zip(fields, values, strict=False)) | {"commit": ask("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")}


def make_model(shape):
    out = ROOT / "build/bench" / f"{shape}.qemb"
    if not out.exists():
        tokenizer = SHARED / "tokenizer/tokenizer.json"
        if not tokenizer.exists():
            print(f"skipped {shape}: no {tokenizer} (QEMB_SHARED)")
            return None
        out.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([PYTHON, ROOT / "tests/make_random_model.py", out.with_suffix(""), "--shape", shape, "--tokenizer",
                        tokenizer], check=True, timeout=LIMIT)
        subprocess.run([PYTHON, ROOT / "convert_weights.py", out.with_suffix(""), "--out", out], check=True, timeout=LIMIT)
    return out


def ids(n, rng):
    """n tokens with end-of-text, no common prefix to share."""
    return [rng.randrange(1000, 100000) for _ in range(n - 1)] + [151643]


def records(n, texts, rng):
    return "".join(json.dumps({"ids": ids(n, rng)}) + "\n" for _ in range(texts)).encode()


class Memory(threading.Thread):
    """The largest use of GPU memory that nvidia-smi sees while the block runs, in MiB above the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_mib = self.used()
        self.peak = self.start_mib
        self.stop = threading.Event()

    @staticmethod
    def used():
        return int(ask("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits") or 0)

    def run(self):
        while not self.stop.wait(0.2):
            self.peak = max(self.peak, self.used())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.join()


def run_qemb(model, data, batch):
    """(seconds, peak MiB) of a run over records, start included."""
    with Memory() as memory:
        start = time.monotonic()
        subprocess.run([ROOT / "qemb-cuda", "-m", model, "--input", "jsonl", "--output", "f32", "--batch-tokens", str(batch)],
                       input=data, stdout=subprocess.DEVNULL, check=True, timeout=LIMIT)
        return time.monotonic() - start, memory.peak - memory.start_mib


def throughput(model, batch):
    rng = random.Random(1)
    start, _ = run_qemb(model, records(4, 1, rng), batch)  # loading; subtracted below
    rows = []
    for n, texts in LENGTHS.items():
        seconds, mib = run_qemb(model, records(n, texts, rng), batch)
        rate = texts / max(seconds - start, 1e-9)
        rows.append({"tokens": n, "batch_tokens": batch, "texts": texts, "seconds": round(seconds, 3),
                     "start_seconds": round(start, 3), "texts_s": round(rate, 1), "tokens_s": round(rate * n),
                     "gpu_mib": mib})
        print("  {tokens:5} tokens, batch {batch_tokens:6} {texts_s:12.1f} texts/s {tokens_s:12} tokens/s {gpu_mib:8} MiB".format(**rows[-1]))
    return rows


def latency(model, n, count=200):
    """Milliseconds from a line written to its answer read, one text at a time: median, 99th percentile."""
    rng = random.Random(2)
    with subprocess.Popen([ROOT / "qemb-cuda", "-m", model, "--input", "jsonl", "--output", "base64"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as p:
        times = []
        for _ in range(count + 20):
            line = records(n, 1, rng)
            start = time.monotonic()
            p.stdin.write(line)
            p.stdin.flush()
            p.stdout.readline()
            times.append((time.monotonic() - start) * 1e3)
        p.stdin.close()
    times = sorted(times[20:])
    row = {"tokens": n, "median_ms": round(statistics.median(times), 3), "p99_ms": round(times[int(count * 0.99)], 3)}
    print("  one text of {tokens:4} tokens {median_ms:9.3f} ms median {p99_ms:9.3f} ms p99".format(**row))
    return row


def sentence_transformers(directory):
    """The same weights and lengths through the reference library, in FP16, on the same GPU."""
    code = ("import json,random,sys,time,torch\nfrom transformers import AutoModel\n"
            "m=AutoModel.from_pretrained(sys.argv[1],torch_dtype=torch.float16).cuda().eval()\nr=random.Random(1)\n"
            "for n in (16,32,64,128,512):\n"
            "    b=max(1,16384//n)\n    x=torch.randint(1000,100000,(b,n)).cuda()\n"
            "    with torch.no_grad():\n"
            "        for i in range(12):\n"
            "            if i==2: torch.cuda.synchronize(); t=time.time()\n"
            "            torch.nn.functional.normalize(m(input_ids=x).last_hidden_state[:,-1].float(),dim=-1)\n"
            "        torch.cuda.synchronize()\n"
            "    print(json.dumps({'tokens':n,'batch':b,'texts_s':round(10*b/(time.time()-t),1)}),flush=True)\n")
    r = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True, check=False, timeout=LIMIT)
    if r.returncode:
        print("  transformers: not run:", (r.stderr.strip().splitlines() or ["?"])[-1])
        return []
    rows = [json.loads(x) for x in r.stdout.splitlines()]
    for row in rows:
        print("  transformers {tokens:5} tokens {texts_s:12.1f} texts/s".format(**row))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", nargs="+", default=["0.6B", "4B"])
    p.add_argument("--sentence-transformers", action="store_true")
    p.add_argument("--out", type=Path, default=ROOT / "bench/results")
    a = p.parse_args()
    if not ask("nvidia-smi", "-L"):
        print("skipped: no GPU")
        return 0
    result = {"machine": machine(), "kernels": [], "models": {}}
    print(json.dumps(result["machine"]))
    kernels = subprocess.run([ROOT / "build/cuda/bench_cuda", "--json"], capture_output=True, text=True, check=True, timeout=LIMIT)
    result["kernels"] = [json.loads(x) for x in kernels.stdout.splitlines()]
    for k in result["kernels"]:
        rate = f"{k['tflop_s']:10.1f} TFLOP/s" if k["tflop_s"] else f"{k['gb_s']:10.1f} GB/s"
        print(f"  {k['op']:12} {k['sizes']:36} {k['us']:12.2f} us {rate}")
    for shape in a.shape:
        model = make_model(shape)
        if not model:
            continue
        print(shape)
        runs = [row for batch in (8192, 16384) for row in throughput(model, batch)]
        single = [latency(model, n) for n in (8, 32, 128, 512)]
        result["models"][shape] = {"throughput": runs, "latency": single}
        if a.sentence_transformers:
            result["models"][shape]["transformers"] = sentence_transformers(model.with_suffix(""))
    a.out.mkdir(parents=True, exist_ok=True)
    name = result["machine"].get("name", "GPU").replace(" ", "-")
    out = a.out / f"{name}-{result['machine']['commit']}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("written:", out.relative_to(ROOT) if out.is_relative_to(ROOT) else out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
