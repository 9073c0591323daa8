#!/usr/bin/env python3
"""Measures qemb-cuda on a GPU: hardware limits, kernels, GEMMs, accuracy, whole runs, memory.

    bench/bench_gpu.py [--shape 0.6B|4B|8B ...] [--out DIR]

It makes models of the real shapes with random weights, which are as fast as the real ones, and
keeps them under build/bench. It prints tables and writes bench/results/GPU-COMMIT.json with GPU,
driver, clocks and commit. Every step has a limit of ten minutes. `make gpu-bench` runs it. Without
a GPU it prints a message and succeeds. If transformers and sentence-transformers are installed,
they are timed on the same weights and texts."""

import argparse
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
    fields = (
        "name",
        "driver_version",
        "memory.total",
        "clocks.max.sm",
        "clocks.max.memory",
        "power.limit",
    )
    values = ask("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").split(
        ", "
    )
    return dict(zip(fields, values, strict=False)) | {
        "commit": ask("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    }


def make_model(shape, dtype="f16"):
    """Makes a file of random weights with that shape. The INT8 file has the same weights."""
    source = ROOT / "build/bench" / shape
    out = source.with_name(f"{shape}-{dtype}.qemb")
    if not out.exists():
        tokenizer = SHARED / "tokenizer/tokenizer.json"
        if not tokenizer.exists():
            print(f"skipped {shape}: no {tokenizer} (QEMB_SHARED)")
            return None
        source.parent.mkdir(parents=True, exist_ok=True)
        if not source.exists():
            subprocess.run(
                [
                    PYTHON,
                    ROOT / "tests/fixtures/make_random_model.py",
                    source,
                    "--shape",
                    shape,
                    "--tokenizer",
                    tokenizer,
                ],
                check=True,
                timeout=LIMIT,
            )
        convert = [PYTHON, ROOT / "convert_weights.py", source, "--out", out]
        subprocess.run(
            convert + (["--dtype", dtype] if dtype != "f16" else []), check=True, timeout=LIMIT
        )
    return out


def ids(n, rng):
    """n tokens with end-of-text, no common prefix to share."""
    return [rng.randrange(1000, 100000) for _ in range(n - 1)] + [151643]


def records(n, texts, rng):
    return "".join(json.dumps({"ids": ids(n, rng)}) + "\n" for _ in range(texts)).encode()


class Memory(threading.Thread):
    """The largest use of GPU memory that nvidia-smi sees while the block runs, in MiB above the
    start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_mib = self.used()
        self.peak = self.start_mib
        self.stop = threading.Event()

    @staticmethod
    def used():
        return int(
            ask("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits") or 0
        )

    def run(self):
        while not self.stop.wait(0.2):
            self.peak = max(self.peak, self.used())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.join()


def run_qemb(model, data, *args, program="qemb-cuda", kind="jsonl"):
    """(vectors as bytes, seconds with the start included, peak MiB, what --stats said) of a run
    over records."""
    with Memory() as memory:
        start = time.monotonic()
        r = subprocess.run(
            [
                ROOT / program,
                "-m",
                model,
                "--input",
                kind,
                "--output",
                "f32",
                "--stats",
                *map(str, args),
            ],
            input=data,
            capture_output=True,
            check=False,
            timeout=LIMIT,
        )
        seconds = time.monotonic() - start
    said = r.stderr.decode(errors="replace").strip()
    if r.returncode:
        raise RuntimeError(f"{program} {' '.join(map(str, args))}: status {r.returncode}: {said}")
    return r.stdout, seconds, memory.peak - memory.start_mib, said


def throughput(model, batch, name, *args):
    rng = random.Random(1)
    args = ("--batch-tokens", batch, *args)
    _, start, _, _ = run_qemb(model, records(4, 1, rng), *args)  # loading; subtracted below
    rows = []
    for n, texts in LENGTHS.items():
        _, seconds, mib, said = run_qemb(model, records(n, texts, rng), *args)
        rate = texts / max(seconds - start, 1e-9)
        rows.append(
            {
                "name": name,
                "tokens": n,
                "batch_tokens": batch,
                "texts": texts,
                "seconds": round(seconds, 3),
                "start_seconds": round(start, 3),
                "texts_s": round(rate, 1),
                "tokens_s": round(rate * n),
                "gpu_mib": mib,
                "stats": said.splitlines()[-1],
            }
        )
        print(
            "  {name:12} {tokens:5} tokens, batch {batch_tokens:6} {texts_s:12.1f} texts/s"
            " {tokens_s:12} tokens/s {gpu_mib:8} MiB".format(
                **rows[-1]
            )
        )
    return rows


def latency(model, n, name, *args, count=200):
    """Latency in ms from writing a line to reading its vector, one text at a time: median and 99th
    percentile."""
    rng = random.Random(2)
    command = [ROOT / "qemb-cuda", "-m", model, "--input", "jsonl", "--output", "base64", *args]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as p:
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
    row = {
        "name": name,
        "tokens": n,
        "median_ms": round(statistics.median(times), 3),
        "p99_ms": round(times[int(count * 0.99)], 3),
    }
    print(
        "  {name:12} one text of {tokens:4} tokens {median_ms:9.3f} ms median"
        " {p99_ms:9.3f} ms p99".format(
            **row
        )
    )
    return row


def unit_vectors(data, n):
    dim = len(data) // 4 // n
    return [struct.unpack_from(f"<{dim}f", data, 4 * dim * i) for i in range(n)]


def accuracy(model, int8):
    """Least cosine and largest error of a number, compared with FP32 on the CPU and the FP16 file.
    Texts that share a prefix are computed together and alone. `stats` says what was recomputed or
    clamped."""
    rng = random.Random(3)
    shared = [rng.randrange(1000, 100000) for _ in range(20)]
    texts = [shared + ids(n, rng) for n in (1, 2, 9, 33, 64, 129)]
    data = "".join(json.dumps({"ids": t}) + "\n" for t in texts).encode()
    want = unit_vectors(run_qemb(model, data, program="build/release/qemb")[0], len(texts))
    rows = []
    for name, file, args in (
        ("f16", model, ()),
        ("f16 alone", model, ("--batch-tokens", "1")),
        ("f16 determ.", model, ("--deterministic",)),
        ("int8", int8, ()),
        ("fp8", model, ("--math", "fp8")),
        ("int8 + fp8", int8, ("--math", "fp8")),
    ):
        try:
            out, _, _, said = run_qemb(file, data, *args)
        except RuntimeError as e:
            print(f"  {name}: {e}")
            rows.append({"name": name, "refused": str(e)})
            continue
        got = unit_vectors(out, len(texts))
        cosine = min(
            sum(x * y for x, y in zip(g, w, strict=True)) for g, w in zip(got, want, strict=True)
        )
        error = max(
            abs(x - y) for g, w in zip(got, want, strict=True) for x, y in zip(g, w, strict=True)
        )
        rows.append(
            {
                "name": name,
                "least_cosine": cosine,
                "largest_error": error,
                "stats": said.splitlines()[-1],
            }
        )
        print(
            f"  {name:12} against the CPU: least cosine {cosine:.6f}, largest error {error:.5f};"
            f" {said.splitlines()[-1]}"
        )
    return rows


def reference(name, code, directory, stdin=None):
    """The JSON values, a line each, that Python code prints about a model's directory. Empty if it
    fails, as it does where the library or a GPU is missing."""
    r = subprocess.run(
        [sys.executable, "-c", code, directory],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    if r.returncode:
        print(f"  {name}: not run:", (r.stderr.strip().splitlines() or ["?"])[-1])
        return []
    return [json.loads(x) for x in r.stdout.splitlines()]


def transformers(directory):
    """The same weights and lengths through the reference library, in FP16, on the same GPU."""
    code = (
        "import json,random,sys,time,torch\nfrom transformers import AutoModel\n"
        "m=AutoModel.from_pretrained(sys.argv[1],torch_dtype=torch.float16).cuda().eval()\n"
        "r=random.Random(1)\n"
        "for n in (16,32,64,128,512):\n"
        "    b=max(1,16384//n)\n    x=torch.randint(1000,100000,(b,n)).cuda()\n"
        "    with torch.no_grad():\n"
        "        for i in range(12):\n"
        "            if i==2: torch.cuda.synchronize(); t=time.time()\n"
        "            y=m(input_ids=x).last_hidden_state[:,-1].float()\n"
        "            torch.nn.functional.normalize(y,dim=-1)\n"
        "        torch.cuda.synchronize()\n"
        "    s=round(10*b/(time.time()-t),1)\n"
        "    print(json.dumps({'tokens':n,'batch':b,'texts_s':s}),flush=True)\n"
    )
    rows = reference("transformers", code, directory)
    for row in rows:
        print("  transformers {tokens:5} tokens {texts_s:12.1f} texts/s".format(**row))
    return rows


def sentence_transformers(directory, model):
    """The same texts through sentence-transformers and through qemb-cuda, start subtracted from
    either."""
    words = (ROOT / "examples/demo.txt").read_text(encoding="utf-8").split()
    rng = random.Random(4)
    texts = [" ".join(rng.choices(words, k=rng.randrange(5, 60))) for _ in range(4000)]
    code = (
        "import json,sys,time\nfrom sentence_transformers import SentenceTransformer\n"
        "m=SentenceTransformer(sys.argv[1],model_kwargs={'torch_dtype':'float16'},device='cuda')\n"
        "t=sys.stdin.read().splitlines()\nm.encode(t[:64],batch_size=64)\ns=time.time()\n"
        "m.encode(t,batch_size=64,normalize_embeddings=True)\n"
        "print(json.dumps(len(t)/(time.time()-s)))\n"
    )
    stdin = "\n".join(texts) + "\n"
    rate = reference("sentence-transformers", code, directory, stdin)
    if not rate:
        return {}
    _, start, _, _ = run_qemb(model, b"one\n", kind="text")
    _, seconds, _, _ = run_qemb(model, stdin.encode(), kind="text")
    row = {
        "texts": len(texts),
        "sentence_transformers_texts_s": round(rate[0], 1),
        "qemb_texts_s": round(len(texts) / max(seconds - start, 1e-9), 1),
    }
    print(
        "  {texts} texts of demo words: sentence-transformers {sentence_transformers_texts_s}"
        " texts/s, qemb {qemb_texts_s}".format(
            **row
        )
    )
    return row


def kernels():
    rows = []
    for math in ("f16", "fp8"):
        r = subprocess.run(
            [ROOT / "build/cuda/bench_cuda", "--json", "--math", math],
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
        if r.returncode:
            print(f"  {math}: {r.stderr.strip()}")
        for line in r.stdout.splitlines():
            k = json.loads(line) | {"math": math}
            rows.append(k)
            rate = f"{k['tflop_s']:10.1f} TFLOP/s" if k["tflop_s"] else f"{k['gb_s']:10.1f} GB/s"
            print(f"  {math:4} {k['op']:12} {k['sizes']:36} {k['us']:12.2f} us {rate}")
    return rows


def measure(shape):
    model, int8 = make_model(shape), make_model(shape, "int8")
    if not model:
        return None
    print(shape)
    cache = ROOT / "build/bench/cublaslt"
    cache.mkdir(parents=True, exist_ok=True)
    timed = ("--cache", str(cache))
    rows = {"accuracy": accuracy(model, int8)}
    refused = {row["name"] for row in rows["accuracy"] if "refused" in row}
    rows["throughput"] = [
        row for batch in (8192, 16384) for row in throughput(model, batch, "f16", *timed)
    ]
    rows["throughput"] += throughput(int8, 8192, "int8", *timed)
    if "fp8" not in refused:
        rows["throughput"] += throughput(model, 8192, "fp8", "--math", "fp8", *timed)
    rows["latency"] = [
        latency(model, n, name, *args, *timed)
        for n in (8, 32, 128, 512)
        for name, args in (("graphs", ()), ("no graphs", ("--no-graphs",)))
    ]
    directory = ROOT / "build/bench" / shape
    rows["transformers"] = transformers(directory)
    rows["sentence_transformers"] = sentence_transformers(directory, model)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", nargs="+", default=["0.6B", "4B"])
    p.add_argument("--out", type=Path, default=ROOT / "bench/results")
    a = p.parse_args()
    if not ask("nvidia-smi", "-L"):
        print("skipped: no GPU")
        return 0
    result = {"machine": machine(), "models": {}}
    print(json.dumps(result["machine"]))
    result["kernels"] = kernels()
    a.out.mkdir(parents=True, exist_ok=True)
    name = result["machine"].get("name", "GPU").replace(" ", "-")
    out = a.out / f"{name}-{result['machine']['commit']}.json"
    for shape in a.shape:
        result["models"][shape] = measure(shape)
        out.write_text(
            json.dumps(result, indent=1) + "\n", encoding="utf-8"
        )  # what was measured is kept
    print("written:", out.relative_to(ROOT) if out.is_relative_to(ROOT) else out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
