"""examples/demo.qemb, the trained model: what `make demo` shows, what it finds, what it says of
itself."""
import os
import re
import subprocess

import numpy as np
import ranking
from helpers import ROOT

QEMB, MODEL = ROOT / "qemb", ROOT / "examples/demo.qemb"
NUMBER = re.compile(r"(?<![\w.])-?0\.\d+")


def run(*args, texts=()):
    r = subprocess.run([str(a) for a in args], cwd=ROOT, capture_output=True, timeout=120,
                       input="".join(t + "\n" for t in texts).encode())
    assert r.returncode == 0, r.stderr
    return r.stdout


def test_readme_shows_what_make_demo_prints():
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    r = subprocess.run(["make", "-s", "demo"], cwd=ROOT, env=env, capture_output=True, text=True,
                       timeout=300)
    assert r.returncode == 0, r.stderr
    printed = r.stdout[r.stdout.index("$ "):]
    shown = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1].lstrip("\n")
    assert NUMBER.sub("x", shown) == NUMBER.sub("x", printed)
    shown, printed = ([float(x) for x in NUMBER.findall(text)] for text in (shown, printed))
    assert len(shown) == 3 + 4
    # A CPU's table adds in its own order: two vectors differ by 3e-6 at most (docs/accuracy.md).
    # That can change a score's fourth decimal by 1. The first four numbers of "Gravity" have
    # length 0.75, and are scaled to length 1.
    np.testing.assert_allclose(shown[:3], printed[:3], rtol=0, atol=1.01e-4)
    np.testing.assert_allclose(shown[3:], printed[3:], rtol=0, atol=3e-6 / 0.75)


def test_it_finds_what_people_need():
    """Of 40 needs, as many are answered as docs/accuracy.md says."""
    corpus = ranking.read_documents(ROOT / "examples/packages.txt")
    corpus = ranking.read_needs(ROOT / "tests/retrieval/needs.tsv", corpus)
    embed = [QEMB, "-m", MODEL, "--output", "f32"]
    documents = run(*embed, texts=corpus.texts)
    queries = run(*embed, "--query", texts=[q.text for q in corpus.queries])
    found = ranking.by_cosine(*(np.frombuffer(v, "<f4").reshape(-1, 256)
                                for v in (queries, documents)))
    judged = ranking.judge(found, [q.accepted for q in corpus.queries])
    page = (ROOT / "docs/accuracy.md").read_text(encoding="utf-8")
    want = [int(n) for n in re.search(r"\| f32 \| avx512 \|.*? (\d+), (\d+) \|", page).groups()]
    got = [round(40 * ranking.top(judged.ranks, k)) for k in (1, 5)]
    assert len(judged.ranks) == 40 and want == [14, 27]
    # Two documents whose scores differ by 1e-6 may change places with the CPU's table.
    np.testing.assert_allclose(got, want, rtol=0, atol=1)


def test_it_names_its_sources_and_licences():
    said = run(QEMB, "info", "-m", MODEL).decode()
    for source in ("Debian 13", "WordNet 3.0 (Copyright 2006 by Princeton University)",
                   "all-MiniLM-L6-v2 (Apache-2.0)", "examples/training"):
        assert source in said


def test_its_size_is_the_one_that_the_examples_say():
    page = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    assert f"{MODEL.stat().st_size / 1e6:.1f} MB" in page
