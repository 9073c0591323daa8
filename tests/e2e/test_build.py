"""What make builds and installs: only some goals install packages, the programs are hardened, and
Python packages are fixed by digest."""
import os
import re
import subprocess

import pytest
from helpers import ROOT, is_sanitized, run
from pip._vendor.packaging.requirements import Requirement

SANITIZED = [b for b in ("QEMB_BIN", "QEMB_SERVE_BIN") if is_sanitized(os.environ.get(b, ""))]
pytestmark = pytest.mark.skipif(bool(SANITIZED), reason="the release build's")


def make_where_nothing_is_installed(tmp_path, goal):
    """Returns make's process, and what it asked apt-get for."""
    calls = tmp_path / "calls"
    calls.touch()
    for name, body in (("dpkg-query", "exit 1"), ("sudo", '"$@"'),
                       ("apt-get", f'echo "$@" >>{calls}; exit 1')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("INSTALLING", "MAKEFLAGS", "MAKELEVEL")}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    p = subprocess.run(["make", goal], cwd=ROOT, env=env, capture_output=True, text=True,
                       timeout=600, check=False)
    return p, calls.read_text()


@pytest.mark.parametrize("goal", ["all", "qemb-serve", "install", "bench", "convert"])
def test_a_build_names_what_is_missing_and_installs_nothing(tmp_path, goal):
    p, calls = make_where_nothing_is_installed(tmp_path, goal)
    assert p.returncode and not calls
    assert re.search(r"packages: missing \(want .*\)\. Install them by: sudo apt-get install ",
                     p.stderr), p.stderr


@pytest.mark.parametrize("goal", ["deps", "demo", "test"])
def test_these_goals_install(tmp_path, goal):
    p, calls = make_where_nothing_is_installed(tmp_path, goal)
    assert p.returncode and calls.startswith("update")  # here, apt-get fails


@pytest.mark.parametrize("binary", ["qemb", "qemb-serve", "build/lib/libqemb.so"])
def test_what_is_built_is_hardened(binary):
    path = ROOT / binary
    header = run("readelf", "-hW", path)
    dynamic = run("readelf", "-dW", path)
    segments = run("readelf", "-lW", path)
    symbols = run("nm", "-D", "--undefined-only", path)
    assert "DYN" in header
    assert ".so" in binary or re.search(r"FLAGS_1.*\bPIE\b", dynamic)
    assert "BIND_NOW" in dynamic and "GNU_RELRO" in segments  # together: full RELRO
    assert re.search(r"GNU_STACK.* RW +0x", segments)  # no stack that can be executed
    assert "__stack_chk_fail" in symbols
    assert re.search(r"__\w+_chk@", symbols.replace("__stack_chk_fail", ""))  # FORTIFY


def requirements(path):
    """The lines of a file of pip's, with those of the files that it names."""
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            yield from requirements(path.parent / line[3:])
        elif line and not line.startswith("#"):
            yield Requirement(line.split(" #")[0])


def converter_needs():
    block = re.search(r"^# /// script\n(.*?)^# ///", (ROOT / "convert_weights.py").read_text(),
                      re.M | re.S)[1]
    return [Requirement(r) for r in re.findall(r'"([^"]*[<>=][^"]*)",\n', block)]


@pytest.mark.parametrize("lock, wanted", [
    ("packaging/convert.lock", converter_needs()),
    ("tests/requirements.lock",
     converter_needs() + list(requirements(ROOT / "tests/requirements-serve.txt"))),
])
def test_locks_fulfil_what_is_wanted_and_have_digests(lock, wanted):
    def normal(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    locked = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / lock).read_text().strip()):
        head, *digests = entry.split(" \\\n")
        r = Requirement(head)
        assert digests and all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}", d) for d in digests)
        (version,) = r.specifier
        assert version.operator == "=="
        locked.setdefault(normal(r.name), []).append(version.version)
    for r in wanted:
        versions = locked[normal(r.name)]
        assert all(r.specifier.contains(v) for v in versions), (r, versions)


@pytest.mark.parametrize("commands, line, status", [
    (("true", "echo '3 tests, 0 failed'", "echo skipped: x"),
     "4 passed, 0 failed, 1 skipped", 0),
    (("true", "false"), "1 passed, 1 failed, 0 skipped", 1),
    (("echo 2 failed, 5 passed in 1.0s; exit 1", "true"), "6 passed, 2 failed, 0 skipped", 1),
    (("kill -9 $PPID",), "0 passed, 1 failed, 0 skipped", 1),  # what watches the command
])
def test_the_runner_of_tests_loses_no_failure(commands, line, status):
    p = subprocess.run([ROOT / "tests/run.sh", *commands], capture_output=True, text=True,
                       timeout=600, check=False)
    assert p.stdout.splitlines()[-1] == line and p.returncode == status, p.stdout + p.stderr
