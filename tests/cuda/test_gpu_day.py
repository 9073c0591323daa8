#!/usr/bin/env python3
"""Tests the scripts of a GPU's day without a GPU, on the emulated programs.

    test_gpu_day.py DIRECTORY     of test_cuda, bench_cuda, qemb-cuda, qemb-serve and qemb-cpu

One day runs with stand-ins for nvidia-smi, ncu and compute-sanitizer, and with a test_cuda that
hangs in one group, crashes in another and fails in a third. Prints "N tests, M failed"."""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import check_sass
import gpu_day
from run_tests import run_tests

ROOT = Path(__file__).resolve().parents[2]
DAY = ROOT / "tests/cuda/gpu_day.py"

# Runs two tests of the group ptx and hangs; crashes before rmsnorm; fails in the group refusals.
TEST_CUDA = """#!/bin/sh
case "$*" in
*"--times --exact ptx_ldmatrix "*)
    {real} --times --exact ptx_ldmatrix ptx_ldmatrix_trans | grep ' s  '
    echo $$ >{tmp}/hung; sleep 1000; exit ;;
*"--exact rmsnorm "*) kill -SEGV $$ ;;
*"--exact refuse_shapes"*) echo "FAIL refuse_shapes: made up"; echo "1 tests, "; exit 1 ;;
esac
exec {real} "$@"
"""
TOOLS = {
    "nvidia-smi": """case "$*" in
*-lms*) while :; do echo "1980, 321.5, 4096"; sleep 0.2; done ;;
*name,*) echo "Made-up GPU, 1.0, 81559 MiB, 1980 MHz, 2619 MHz, 700.00 W, 9.0" ;; esac""",
    "ncu": """case "$*" in *"--kill yes"*"regex:rmsnorm_kernel"*"--only rmsnorm T 32")
    echo "Section: made up"; exit 9 ;; esac; exit 1""",
    "compute-sanitizer": """[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 1
[ $2 = racecheck ] && exit 9; shift 4; exec "$@" """,
}
STEPS = (r"^(test (ptx$|kernels|refusals|hopper gate)|small|graphs on|(mem|race)check ptx_l|"
         r"kernels|ncu|fact: libraries|0.6B (f16|vectors|accuracy: (f16|fp8))|4B int8|"
         r"4B one text of 8|4B variant fp8, 32)")


def programs(built, tmp):
    """A folder of programs whose test_cuda misbehaves, and an environment with the stand-ins."""
    folder, tools = tmp / "emu-day", tmp / "tools"
    folder.mkdir()
    tools.mkdir()
    for name, source in (("bench_cuda", "bench_cuda"), ("qemb-cuda", "qemb-cuda"),
                         ("qemb", "qemb-cpu"), ("qemb-serve-cuda", "qemb-serve")):
        (folder / name).symlink_to(built / source)
    scripts = {folder / "test_cuda": TEST_CUDA.format(real=built / "test_cuda", tmp=tmp)}
    scripts |= {tools / name: f"#!/bin/sh\n{text}\n" for name, text in TOOLS.items()}
    for path, text in scripts.items():
        path.write_text(text)
        path.chmod(0o755)
    return folder, os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}


def run_day(folder, out, env, *args):
    return subprocess.run([DAY, *args, "--programs", folder, "--out", out, "--quick"], env=env,
                          capture_output=True, text=True, timeout=300, check=False)


def rows_of(out):
    return {(r := json.loads(line))["step"]: r for log in sorted(out.glob("*.jsonl"))
            for line in log.read_text().splitlines()}


def alive(pid):
    """Whether it runs; one that has ended may wait for init to collect it."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_day(built):
    """What hangs, crashes or fails is written down, and everything else runs."""
    with tempfile.TemporaryDirectory() as t:
        tmp = Path(t)
        folder, env = programs(built, tmp)
        done = run_day(folder, tmp / "out", env, "--limit", "12", "--steps", STEPS)
        assert done.returncode == 1, done.stdout + done.stderr
        rows = rows_of(tmp / "out")
        results = {step: r["result"] for step, r in rows.items()}
        ptx, kernels = rows["test ptx"], rows["test kernels"]
        assert ptx["result"] == "timeout" and ptx["stopped"] == {"ptx_mma_f16": "timeout"}, ptx
        assert ptx["ended"] == ptx["of"] - 1 and not ptx["not_run"], ptx
        assert not alive(int((tmp / "hung").read_text())), "the hung process lives"
        assert kernels["result"] == "crashed" and kernels["stopped"] == {"rmsnorm": "crashed"}
        assert kernels["ended"] == kernels["of"] - 1, kernels
        assert rows["test refusals"]["result"] == "failed"
        assert rows["test refusals"]["failed"] == ["refuse_shapes"], rows["test refusals"]
        assert results.pop("racecheck ptx_ldmatrix") == "failed"
        bad = {step: r for step, r in results.items() if r != "ok" and not step.startswith("test")}
        assert not bad, (bad, [rows[s] for s in bad])
        wanted = ["test hopper gate_up", "graphs on and off: same bits", "memcheck ptx_ldmatrix",
                  "ncu rmsnorm T 32", "4B int8 f16, 32 tokens", "0.6B accuracy: fp8",
                  "4B one text of 8, graphs", "4B variant fp8, 32 tokens", "end"]
        assert not [s for s in wanted if results.get(s) != "ok"], results
        rate = rows["0.6B f16, 32 tokens"]
        assert rate["texts"] == 3 and rate["tokens_s"] > 0 and rate["args"][0] == "--cache", rate
        clocks = rows["kernels fp8"]["clocks"]  # of a step that takes a second
        assert clocks["sm_mhz"] == 1980 and clocks["gpu_mib"] == 4096, clocks
        assert rows["0.6B accuracy: f16"]["least_cosine"] > 0.9999, rows["0.6B accuracy: f16"]
        assert rows["0.6B accuracy: fp8"]["least_cosine"] > 0.9, rows["0.6B accuracy: fp8"]
        assert rows["machine"]["name"] == "Made-up GPU" and rows["machine"]["commit"]
        assert rows["kernels fp8"]["kernels"][0]["op"] == "rmsnorm"
        assert [p for p in (tmp / "out").iterdir() if p.name.startswith("cublaslt-")], "no cache"
        pages = subprocess.run([ROOT / "bench/gpu_table.py", tmp / "out"], capture_output=True,
                               text=True, check=True).stdout
        for text in ("Made-up GPU, 1.0, 81559 MiB", "| test kernels | crashed |",
                     "ptx_mma_f16: timeout", "### 0.6B: tokens/s\n| tokens a text | f16 |",
                     "| rmsnorm | T 32 |", "| 0.6B accuracy: fp8 | 0.9"):
            assert text in pages, (text, pages)


def test_no_time(built):
    """A step that does not fit is not started, and says so."""
    with tempfile.TemporaryDirectory() as t:
        folder, env = programs(built, Path(t))
        done = run_day(folder, Path(t) / "out", env, "check", "--seconds", "4", "--steps",
                       "^test ptx$")
        assert done.returncode == 0, done
        row = rows_of(Path(t) / "out")["test ptx"]
        assert row["result"] == "no time" and row["left"] <= 4, row


def test_no_gpu(built):
    """Programs that find no GPU: status 77, and no step that looks like a good one."""
    with tempfile.TemporaryDirectory() as t:
        folder, env = programs(built, Path(t))
        done = run_day(folder, Path(t) / "out", env | {"QEMB_EMU": "count=0"})
        assert done.returncode == 77 and done.stdout.startswith("skipped"), done
        assert not rows_of(Path(t) / "out")
        for program in ("test_cuda", "bench_cuda"):
            p = subprocess.run([built / program], env=env | {"QEMB_EMU": "count=0"},
                               capture_output=True, text=True, check=False)
            assert p.returncode == 77 and p.stdout.startswith("skipped"), p


def test_skipped_is_not_ok(_built):
    for script, result in (("echo skipped: no torch", "skipped"), ("exit 77", "skipped"),
                           ("echo 2 of 3 skipped", "ok"), ("echo skipped; exit 3", "failed"),
                           ("kill -ABRT $$", "crashed"), ("exec sleep 9", "timeout")):
        done = gpu_day.execute(["sh", "-c", script], 2)
        assert done.result == result, (script, done.result)
    assert gpu_day.execute(["no-such-program"], 2).result == "skipped"


def test_groups(built):
    """Every test belongs to exactly one group."""
    tests = subprocess.run([built / "test_cuda", "--list"], capture_output=True, text=True,
                           check=True).stdout.split()
    assert len(tests) > 60 and len(set(tests)) == len(tests)
    for test in tests:
        groups = [name for name, names in gpu_day.GROUPS if re.fullmatch(names, test)]
        assert len(groups) == 1, f"{test}: in groups {groups}: see GROUPS in gpu_day.py"
    counts = collections.Counter(map(gpu_day.group_of, tests))
    assert set(counts) == {name for name, _ in gpu_day.GROUPS}, "a group without tests"
    for _, _, names in gpu_day.SANITIZED:
        assert any(re.fullmatch(names, test) for test in tests), names


def test_other_gpus(built):
    """On a GPU without FP8 and without Hopper's instructions their tests are skipped."""
    fp8 = ["op_fp8_products", "fp8_fast_accumulation", "int8_loaded_in_pieces", "fp8_same_bits",
           "accuracy", "graph_same_bits", "timed_once_fp8"]
    hopper = ["ptx_tma", "ptx_wgmma256", "gate_up_hopper", "attention_hopper_64", "hopper_graphs"]
    p = subprocess.run([built / "test_cuda", "--exact", *fp8, *hopper, "rmsnorm"], cwd=ROOT,
                       env=os.environ | {"QEMB_EMU": "major=8 minor=0"}, capture_output=True,
                       text=True, check=False)
    assert p.returncode == 0 and "13 tests" in p.stdout and "0 failed" in p.stdout, p.stdout
    for test in fp8 + hopper:
        assert f"skipped {test}: " in p.stdout, (test, p.stdout)


def test_slowest(_built):
    rows = [("device_copy", "256 MiB", 100, 3000, 0), ("matmul", "ceiling T", 9, 1, 800),
            ("rmsnorm", "T 8192", 50, 2700, 0), ("rmsnorm", "T 32", 3, 100, 0),
            ("attention", "T 8192, texts of 16", 30, 300, 8),
            ("attention", "T 8192, texts of 512", 90, 90, 200), ("matmul", "qkv T", 20, 9, 400)]
    names = ("op", "sizes", "us", "gb_s", "tflop_s")
    found = gpu_day.slowest([dict(zip(names, r)) for r in rows])
    assert found == [(0.1, "attention", "T 8192, texts of 16"), (0.9, "rmsnorm", "T 8192")], found


def test_bench(built):
    """Rows that --only names, in both arithmetics and on Hopper's kernels."""
    for math, only in (("f16", "matmul_add down T 16 "), ("fp8", "matmul qkv T 16 "),
                       ("fp8", "matmul_add down T 16 "), ("fp8", "gate_up T 16 F"),
                       ("f16", "gate_up_hopper T 256 ")):
        p = subprocess.run([built / "bench_cuda", "--json", "--math", math, "--only", only, "64",
                            "2", "1", "64", "96"], capture_output=True, text=True, check=False)
        rows = [json.loads(x) for x in p.stdout.splitlines()]
        assert p.returncode == 0 and len(rows) == 1, (math, only, p)
        assert f"{rows[0]['op']} {rows[0]['sizes']}".startswith(only), rows


def test_big_model(built):
    """make_big_qemb.py's files pass the loader and give vectors."""
    with tempfile.TemporaryDirectory() as t:
        for flags in ([], ["--int8"]):
            model = f"{t}/tiny.qemb"
            subprocess.run([ROOT / "tests/fixtures/make_big_qemb.py", model, "--shape", "tiny",
                            *flags], check=True, capture_output=True)
            info = subprocess.run([built / "qemb-cpu", "info", model], capture_output=True,
                                  text=True, check=False)
            assert info.returncode == 0 and ("int8" in info.stdout) == bool(flags), info
            texts = "".join(json.dumps({"ids": [i, 7, 151643]}) + "\n" for i in (5, 1000))
            p = subprocess.run([built / "qemb-cpu", "-m", model, "--input", "jsonl"], input=texts,
                               capture_output=True, text=True, check=False)
            vectors = [json.loads(x) for x in p.stdout.splitlines()]
            assert len(vectors) == 2 and vectors[0] != vectors[1], p


def test_ptxas_log(_built):
    """A remark that wgmma is serialized fails, although ptxas does not."""
    good = ("ptxas info    : Compiling entry function '_Z4kernel' for 'sm_90a'\n"
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n")
    bad = ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
           "serialized due to insufficient register resources in function '_Z4kernel'\n")
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as f:
        spill = good.replace("0 bytes spill s", "8 bytes spill s")
        for text, problems in ((good, 0), (good + bad, 1), (spill, 1)):
            f.seek(0)
            f.truncate()
            f.write(text)
            f.flush()
            assert len(check_sass.check_log(f.name)[1]) == problems, text


if __name__ == "__main__":
    sys.exit(run_tests(globals(), Path(sys.argv[1]).resolve()))
