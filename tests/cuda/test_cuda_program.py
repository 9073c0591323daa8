#!/usr/bin/env python3
"""Compares the program qemb-cuda with qemb on the CPU.

    test_cuda_program.py QEMB-CUDA QEMB-CPU

QEMB-CUDA is the emulated build, or the real one on a machine with a GPU. With the small model,
records of all kinds give the same records, and vectors within the bound of test_cuda_model.cu.
Options of a GPU and a model that overflows FP16 are tested too. Tests that need a missing, old,
small or failing GPU run on the emulated build alone, which reads a variable described in
tests/cuda/emu/emu.h."""

import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/fixtures"))
from edit_qemb import Qemb  # noqa: E402

MODEL = ROOT / "tests/fixtures/small.qemb"
MIN_COSINE = 0.99998  # derived in test_cuda_model.cu
MIN_COSINE_FP8 = 0.978  # in test_cuda_quantize.cu


def records():
    texts = (ROOT / "tests/fixtures/small.txt").read_text(encoding="utf-8").splitlines()[:12] + [
        "",
        "same",
        "same",
        "x" * 300,
    ]
    for i, text in enumerate(texts):
        yield {"id": i, "text": text}
    yield {"id": "query", "text": "what?", "instruct": "Find an answer"}
    yield {"id": "short", "text": "four numbers", "dim": 4}
    yield {"id": "bad", "text": 5}


STDIN = "".join(json.dumps(r) + "\n" for r in records())


def cosine(a, b):
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms


def run(program, *args, stdin=STDIN, model=MODEL, command=None, emu=""):
    """--batch-tokens: several batches, the emulation is slow with long ones."""
    embed = ["--input", "jsonl", "--output", "jsonl", "--batch-tokens", "256", "--threads", "1"]
    command = [
        program,
        *([command] if command else []),
        "-m",
        str(model),
        *([] if command else embed),
        *args,
    ]
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | {"QEMB_EMU": emu},
    )


def compare(got, want, least):
    assert got.returncode == want.returncode == 3, (
        got.returncode,
        want.returncode,
        got.stderr,
    )  # 3: one record is bad
    got, want = ([json.loads(line) for line in r.stdout.splitlines()] for r in (got, want))
    assert len(got) == len(want) == STDIN.count("\n"), (len(got), len(want))
    worst = 1.0
    for g, w in zip(got, want, strict=True):
        a, b = g.pop("embedding", None), w.pop("embedding", None)
        assert g == w, (g, w)
        if a is None:
            assert b is None and "error" in g, g
            continue
        assert len(a) == len(b) and all(map(math.isfinite, a)), g
        c = cosine(a, b)
        worst = min(worst, c)
        assert c >= least, (g, c)
    return worst


def overflowing_model(path):
    """The small model with a norm whose weights are 70000: halves end at 65504. Queries and keys
    are normed again behind it and values only grow, so FP32 takes it."""
    f = Qemb(MODEL)
    norm = f.sections["layers.1.attn_norm"]
    norm[4] = struct.pack("<f", 70000.0) * (len(norm[4]) // 4)
    f.write(path)


def check_numbers(cuda, cpu, fp8):
    want = run(cpu)
    worst = compare(run(cuda, "--stats"), want, MIN_COSINE)
    if fp8:
        compare(run(cuda, "--math", "fp8"), want, MIN_COSINE_FP8)
    compare(run(cuda, "--hopper"), want, MIN_COSINE)
    assert run(cuda, "--no-graphs", "--deterministic").stdout == run(cuda, "--deterministic").stdout
    # bit by bit, whatever is computed together
    alone = run(cuda, "--deterministic", "--batch-tokens", "1").stdout
    assert alone == run(cuda, "--deterministic", "--batch-tokens", "2048").stdout
    return worst


def check_overflow(cuda, cpu):
    with tempfile.TemporaryDirectory() as tmp:
        model = Path(tmp) / "overflow.qemb"
        overflowing_model(model)
        stdin = "one\ntwo words\none\n"
        # the stand-in is the fastest table that copies no weights: AVX2's, or the plain one
        exact = "avx2" if "avx2" in run(cpu, "--cpu", "?").stderr else "plain"
        got, want = (
            run(*p, "--input", "text", "--stats", "--batch-tokens", "64", stdin=stdin, model=model)
            for p in ((cuda,), (cpu, "--cpu", exact))
        )
        assert got.returncode == want.returncode == 0, got.stderr
        assert got.stdout == want.stdout, "not the CPU's own vectors"
        assert "qemb: 2 vectors recomputed on the CPU, 0 numbers clamped" in got.stderr, got.stderr
        assert "recomputed" not in want.stderr


def check_plan(cuda, cpu):
    p = run(cuda, command="plan")
    gpu = p.stdout.partition("On the GPU:\n")[2]
    for part in (
        "weights of the layers, FP16",
        "activations",
        "workspace",
        "the upload of weights",
        "the embedding table",
        "graphs",
        "in all",
    ):
        assert part in gpu, p.stdout
    assert p.returncode == 0 and "e4m3" in run(cuda, "--math", "fp8", command="plan").stdout
    assert "On the GPU" not in run(cpu, command="plan").stdout
    p = run(cuda, "--vram", "20", command="plan")
    assert p.returncode == 2 and "GPU memory: more than --vram (got " in p.stderr, p.stderr
    p = run(cuda, "--vram", "20")
    assert (
        p.returncode == 2 and "GPU memory: not enough for " in p.stderr and not p.stdout
    ), p.stderr
    for option in (
        ["--vram", "9"],
        ["--deterministic"],
        ["--no-graphs"],
        ["--hopper"],
        ["--devices", "0"],
        ["--cache", "."],
    ):
        p = run(cpu, *option)
        assert p.returncode == 1 and f"{option[0]}: only with a GPU" in p.stderr, p.stderr
    p = run(cuda, "--math", "bf16")
    assert (
        p.returncode == 1
        and "--math: not with this program on this machine (got bf16, want fp8, f16)" in p.stderr
    ), p.stderr


def check_devices(cuda, cpu):
    for emu, message in (
        ("count=0", "GPU: none found (no CUDA-capable device"),
        ("driver=0", "NVIDIA driver: missing or too old (got one for CUDA 0.0, want "),
        ("major=7 minor=5", "GPU: too old (got compute capability 7.5, want 8.0 or newer)"),
        ("image=0", "GPU: this build has no code for compute capability 9.0"),
        ("memory=40", "GPU memory: not enough for cuBLASLt's workspace (got "),
    ):
        p = run(cuda, emu=emu)
        assert p.returncode == 2 and not p.stdout and p.stderr.startswith("qemb: " + message), (
            emu,
            p.stderr,
        )
        assert p.stderr.count("\n") == 1, p.stderr
    p = run(cuda, "--math", "fp8", emu="major=8 minor=6")
    assert p.returncode == 2 and "FP8 products: not on this GPU" in p.stderr, p.stderr
    # where cuBLASLt applies no scales
    compare(run(cuda, "--math", "fp8", emu="major=8 minor=9"), run(cpu), MIN_COSINE_FP8)
    # It fails in a later batch: what was computed is out, whole; then the reason, and status 2
    # although more input could come.
    whole = run(cuda, "--batch-tokens", "64").stdout
    p = run(cuda, "--stats", "--batch-tokens", "64", emu="fault_after=80")
    assert (
        p.returncode == 2 and p.stdout and whole.startswith(p.stdout) and p.stdout.endswith("}\n")
    ), p.stdout[-200:]
    assert (
        p.stdout != whole and "qemb: GPU: " in p.stderr.splitlines()[-1] and " failed (" in p.stderr
    ), p.stderr
    assert "qemb: 0 vectors recomputed" in p.stderr, p.stderr


def check_several(cuda):
    """The same vectors in the same order from several devices, also if some of them fail."""
    batch = ("--batch-tokens", "64", "--stats")
    many = STDIN * 4  # so many batches that each device gets some, whichever thread wakes first
    want = run(cuda, *batch, stdin=many)
    for emu, devices, used in (
        ("count=2 report=1", "0,1", [0, 1]),
        ("count=2 report=1", "1", [1]),
        ("count=4 report=1", "all", [0, 1, 2, 3]),
    ):
        p = run(cuda, *batch, "--devices", devices, stdin=many, emu=emu)
        assert p.returncode == want.returncode and p.stdout == want.stdout, (emu, p.stderr)
        launches = re.findall(r"emulated: device (\d): (\d+) launches\n", p.stderr)
        assert [int(d) for d, n in launches if int(n)] == used, p.stderr
        lines = re.findall(r"qemb: device \d: [1-9]\d* batches", p.stderr)
        assert len(lines) == (len(used) if len(used) > 1 else 0), p.stderr
    for emu, failed in (
        ("count=2 fault_device=1 fault_after=60", 1),
        ("count=4 fault_device=0 fault_after=5", 1),
    ):
        p = run(cuda, *batch, "--devices", "all", stdin=many, emu=emu)
        assert p.returncode == want.returncode and p.stdout == want.stdout, (emu, p.stderr)
        assert f" devices, {failed} failed\n" in p.stderr, p.stderr
        assert p.stderr.count("; the other devices take its batches\n") == failed, p.stderr
    p = run(cuda, *batch, "--devices", "all", stdin=many, emu="count=2 fault_after=300")
    assert p.returncode == 2 and p.stdout and want.stdout.startswith(p.stdout), p.stderr
    assert "qemb: 2 devices, 2 failed\n" in p.stderr, p.stderr
    p = run(cuda, "--devices", "0,1", emu="count=2 memory=40")
    assert p.returncode == 2 and re.match("qemb: device [01]: GPU memory: ", p.stderr), p.stderr
    for devices, message in (("0,3", "no GPU 3 (got 2 GPUs)"), ("1,1", "GPU 1 twice")):
        p = run(cuda, "--devices", devices, emu="count=2")
        assert p.returncode == 1 and f"--devices: {message}" in p.stderr, p.stderr
    for devices in ("all", "3"):  # no GPU at all: what is wrong with the machine comes first
        p = run(cuda, "--devices", devices, emu="count=0")
        assert p.returncode == 2 and "GPU: none found" in p.stderr, p.stderr


def main(cuda, cpu):
    emulated = "emu" in Path(cuda).parent.name
    fp8 = emulated or run(cuda, "--math", "fp8", stdin="").returncode == 0
    worst = check_numbers(cuda, cpu, fp8)
    check_overflow(cuda, cpu)
    check_plan(cuda, cpu)
    if emulated:
        check_devices(cuda, cpu)
        check_several(cuda)
    print(
        f"program: {STDIN.count(chr(10))} records as from the CPU, least cosine {worst:.7f};"
        " overflow, plan, messages"
        f"{'' if emulated else ' (no other GPU emulated)'}{'' if fp8 else ', no FP8 here'}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
