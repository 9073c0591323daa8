#!/usr/bin/env python3
"""Checks the folder that `make gpu-pack` made, and that make needs no network for it.

    test_gpu_pack.py FOLDER

Prints "N tests, M failed"; "skipped: why" for what this machine does not allow."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from run_tests import run_tests

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("test_cuda", "bench_cuda", "qemb-cuda", "qemb-serve-cuda", "qemb")
MIB = 64  # what a machine may take at most
GLIBC = (2, 35)  # of Ubuntu 22.04
# glibc's own libraries; cuBLASLt comes with the toolkit or with PyTorch
LIBRARIES = r"lib(c|m|dl|rt|pthread)\.so\.\d+|ld-linux-x86-64\.so\.2"


def check(condition, *why):
    if not condition:
        raise AssertionError(" ".join(map(str, why)))


def dynamic(path):
    """(libraries, versions of glibc) that an ELF file asks for."""
    said = subprocess.run(["readelf", "-W", "-d", "-V", path], capture_output=True, text=True,
                          check=True).stdout
    libraries = re.findall(r"\(NEEDED\)\s+Shared library: \[(.*)\]", said)
    versions = re.findall(r"Name: GLIBC_(\d+)\.(\d+)", said)
    return libraries, [(int(a), int(b)) for a, b in versions]


def make(*args, env=None, offline=False):
    """Not a part of the make that runs this program: its job server is out of reach."""
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = (["unshare", "-rn"] if offline else []) + ["make", *args]
    return subprocess.run(command, cwd=ROOT, env=clean | (env or {}), capture_output=True,
                          text=True, check=False)


def test_programs(pack):
    """They need glibc up to 2.35 and cuBLASLt, and no other library."""
    for name in PROGRAMS:
        libraries, versions = dynamic(pack / name)
        others = [x for x in libraries if not re.fullmatch(LIBRARIES, x)]
        wanted = [] if name == "qemb" else ["libcublasLt.so"]
        check([re.sub(r"\.\d+$", "", x) for x in others] == wanted, name, "needs", others)
        check(versions and max(versions) <= GLIBC, name, "needs glibc", max(versions))


def test_self_check(_pack):
    """The reader finds what is there: readelf needs libraries of its own, and some glibc."""
    libraries, versions = dynamic(shutil.which("readelf"))
    check([x for x in libraries if not re.fullmatch(LIBRARIES, x)] and versions, libraries)


def test_folder(pack):
    """It is small, and holds all that the day reads: the script runs in it, elsewhere."""
    size = sum(f.stat().st_size for f in pack.rglob("*") if f.is_file()) / (1 << 20)
    check(size < MIB, f"{size:.1f} MiB")
    with tempfile.TemporaryDirectory() as t:
        copy = Path(t) / "pack"
        shutil.copytree(pack, copy)
        for script in ("tests/cuda/test_cuda_program.py", "tests/cuda/test_cuda_serve.py",
                       "tests/cuda/gpu_day.py", "bench/bench_transformers.py"):
            for path in re.findall(r'ROOT / ["]([^"]+)"', (copy / script).read_text()):
                made = path.startswith(("build/", "bench/results", "test_cuda"))
                check(made or (copy / path).exists(), script, "reads", path)
        model = copy / "tiny.qemb"
        subprocess.run(["python3", copy / "tests/fixtures/make_big_qemb.py", model, "--shape",
                        "tiny"], check=True, capture_output=True)
        texts = '{"ids": [5, 151643]}\n'
        p = subprocess.run([copy / "qemb", "-m", model, "--input", "jsonl", "--dim", "2"],
                           input=texts, capture_output=True, text=True, check=False)
        check(p.returncode == 0 and p.stdout.startswith("["), p)
        p = subprocess.run(["python3", copy / "tests/cuda/gpu_day.py", "check", "--steps",
                            "machine", "--out", copy / "out"], capture_output=True, text=True,
                           check=False)
        check(p.returncode in (0, 77), p.stdout, p.stderr)
        check(p.returncode == 0 or p.stdout.startswith("skipped"), p.stdout)


def failing_tools(folder):
    """A PATH whose first folder has an apt-get and a pip that say so and fail."""
    for name in ("apt-get", "pip", "pip3", "sudo", "curl", "wget"):
        tool = folder / name
        tool.write_text(f"#!/bin/sh\necho {name} >>{folder}/ran\nexit 1\n")
        tool.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_no_network(_pack):
    """Both targets work without a network, apt-get and pip; nothing in them would run these."""
    plan = make("-nB", "gpu-day").stdout
    check(" apt-get" not in plan and "pip install" not in plan, "make would install something")
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        print("skipped: make without a network: unshare -rn is not permitted")
        return
    with tempfile.TemporaryDirectory() as t:
        path = failing_tools(Path(t))
        p = make("-s", "gpu-day", "PHASE=check --steps machine", f"OUT={t}/out", env={"PATH": path},
                 offline=True)
        check(p.returncode == 0 and not (Path(t) / "ran").exists(), p.stdout, p.stderr)


def test_missing_library(_pack):
    """A machine that lacks something says so in a line."""
    with tempfile.TemporaryDirectory() as t:
        cc = Path(t) / "cc"
        cc.write_text('#!/bin/sh\ncase "$*" in *print-file-name=libjansson.a) echo libjansson.a ;;'
                      ' *-E*) ! grep openssl ;; *) exec gcc "$@" ;; esac\n')
        cc.chmod(0o755)
        p = make("-s", "gpu-day", f"CC={cc}")
        said = "gpu-pack: this machine lacks libjansson-dev libssl-dev\n"
        check(p.returncode and p.stdout == said, p.stdout, p.stderr)


def test_old_toolkit(_pack):
    """Every target refuses a toolkit before 12.9."""
    with tempfile.TemporaryDirectory() as t:
        (Path(t) / "include").mkdir()
        (Path(t) / "include/cuda_fp16.h").touch()
        (Path(t) / "include/cuda.h").write_text("#define CUDA_VERSION 12040\n")
        for target in ("qemb-cuda", "gpu-pack", "test-emu"):
            p = make("-s", target, f"CUDA={t}")
            said = f"got CUDA_VERSION 12040 in {t}, want 12090 or newer"
            check(p.returncode and p.stdout == f"CUDA toolkit: too old ({said})\n", p.stdout)
        p = make("-s", "gpu-day", f"CUDA={t}/none")
        check(p.returncode == 0 and p.stdout.startswith("skipped: no CUDA toolkit"), p.stdout)


if __name__ == "__main__":
    sys.exit(run_tests(globals(), Path(sys.argv[1]).resolve()))
