"""What `make install` gives a C or C++ program: qemb.h, libqemb.a, qemb.pc; examples/embed.c; the
shared library; examples/python/pipe.py, which needs the program alone."""
import json
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, run, vectors_of

MODEL = ROOT / "tests/fixtures/small.qemb"
EXAMPLE = ROOT / "examples/embed.c"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def flags(prefix, static=False):
    """What the compiler and the linker need. A program finds the shared library by itself only
    where the loader looks, so the tests name its folder."""
    env = os.environ | {"PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig")}
    if static:
        words = run("pkg-config", "--static", "--cflags", "--libs", "qemb", env=env).split()
        return [str(prefix / "lib/libqemb.a") if w == "-lqemb" else w for w in words]
    return [*run("pkg-config", "--cflags", "--libs", "qemb", env=env).split(),
            f"-Wl,-rpath,{prefix}/lib"]


@pytest.mark.parametrize("compiler", [["gcc", "-std=c11"], ["clang", "-std=c17"],
                                      ["g++", "-std=c++17", "-x", "c++"]])
@pytest.mark.parametrize("static", [False, True])
def test_example_prints_the_cosines_of_the_programs_vectors(installed, tmp_path, compiler, static):
    run(*compiler, *STRICT, EXAMPLE, "-x", "none", "-o", tmp_path / "embed",
        *flags(installed, static))
    assert ("libqemb.so.0" in run("readelf", "-d", tmp_path / "embed")) != static
    documents = ["Beijing is a city.", "Gravity attracts bodies."]
    out = run(tmp_path / "embed", MODEL, "capital of China", *documents)
    (query,) = vectors_of(["capital of China"], "--query", model=MODEL).tolist()
    want = [f"{sum(a * b for a, b in zip(query, d)):.4f}  {text}"
            for d, text in zip(vectors_of(documents, model=MODEL).tolist(), documents)]
    assert out.splitlines() == want


PIPE = ROOT / "examples/python/pipe.py"


def test_pipe_prints_the_same():
    documents = ["Beijing is a city.", "Größe: 中"]
    env = os.environ | {"QEMB": str(ROOT / "qemb")}
    out = run(sys.executable, PIPE, MODEL, "capital of China", *documents, env=env)
    (query,) = vectors_of(["capital of China"], "--query", model=MODEL).tolist()
    want = [f"{sum(a * b for a, b in zip(query, d)):.4f}  {text}"
            for d, text in zip(vectors_of(documents, model=MODEL).tolist(), documents)]
    assert out.splitlines() == want
    r = subprocess.run([sys.executable, PIPE, MODEL, "a", "b " * 3000], env=env,
                       capture_output=True, text=True, check=False)
    assert r.returncode == 1 and "too_long" in r.stderr


def test_pipe_does_not_shift(monkeypatch):
    """By newlines, by texts that fail, by answers that nobody has read."""
    monkeypatch.setenv("QEMB", str(ROOT / "qemb"))
    monkeypatch.syspath_prepend(str(PIPE.parent))
    pipe = __import__("pipe").Embedder(str(MODEL))
    texts = ["one\ntwo", "a\r\nb\n", "\n", "", "NUL \0", "b " * 3000, "\ud800", "\u2028", "last"]
    got = {}
    for text in texts:
        try:
            got[text] = pipe.embed(text)
        except ValueError as e:
            assert ("too_long" if text[0] == "b" else "surrogates not allowed") in str(e)
    pipe.qemb.stdin.write(b'{"id": 0, "text": "not asked"}\n')
    assert pipe.embed("last") == got["last"]
    pipe.qemb.stdin.close()
    assert pipe.qemb.wait() and len(got) == len(texts) - 2
    for text, vector in got.items():
        record = json.dumps({"text": text}).encode() + b"\n"
        alone = subprocess.run([ROOT / "qemb", "-m", MODEL, "--input", "jsonl"], input=record,
                               capture_output=True, check=True).stdout
        assert vector == json.loads(alone)


def test_example_is_short_and_names_what_is_wrong(installed, tmp_path):
    assert len(EXAMPLE.read_text().splitlines()) <= 50
    run("cc", EXAMPLE, "-o", tmp_path / "embed", *flags(installed))
    r = subprocess.run([tmp_path / "embed", "no-such.qemb", "a", "b"], capture_output=True,
                       text=True, check=False)
    assert r.returncode == 1 and not r.stdout
    assert re.fullmatch("embed: no-such.qemb: .*\n", r.stderr)
    r = subprocess.run([tmp_path / "embed"], capture_output=True, text=True, check=False)
    assert r.returncode == 1 and r.stderr.startswith("usage: ")


def symbols(prefix):
    """(type, name) of each global symbol of the library."""
    table = run("nm", "-g", "--defined-only", prefix / "lib/libqemb.a")
    return re.findall(r"^[0-9a-f]+ ([A-Z]) (\S+)$", table, re.M)


def test_library_shows_only_names_that_begin_with_qemb(installed):
    names = [name for _, name in symbols(installed)]
    assert "qemb_embed_text" in names
    assert [n for n in names if not n.startswith("qemb_")] == []


def test_every_function_of_the_header_is_in_the_library(installed):
    header = (installed / "include/qemb.h").read_text()
    declared = set(re.findall(r"^(?!static)[a-z].*?\b\*?(qemb_\w+)\(", header, re.M))
    assert declared == {name for kind, name in symbols(installed) if kind == "T"}


def test_shared_library_shows_the_same_names(installed):
    library = installed / "lib/libqemb.so"
    names = re.findall(r"^\S+ [A-Z] (\S+)$", run("nm", "-D", "--defined-only", library), re.M)
    assert sorted(names) == sorted(name for _, name in symbols(installed))
    assert "[libqemb.so.0]" in run("readelf", "-d", library)


def test_manual_pages_and_version_are_installed(installed):
    manual = (ROOT / "docs/man/qemb.1").read_text()
    assert (installed / "share/man/man1/qemb.1").read_text() == manual
    version = re.search(r'QEMB_VERSION "(.*)"', (installed / "include/qemb.h").read_text())[1]
    assert f"Version: {version}\n" in (installed / "lib/pkgconfig/qemb.pc").read_text()
    assert version in run(installed / "bin/qemb", "--version")


def test_installed_grep_finds_the_demo_model(installed):
    p = subprocess.run([installed / "bin/qemb", "grep", "-k", "1", "words"], input=b"a word\n",
                       capture_output=True, cwd="/", check=True)
    assert p.stdout.endswith(b"\ta word\n")
