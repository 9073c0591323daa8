"""tests/retrieval: the figures of hand-made rankings, and the program on a few made-up texts."""
import subprocess
import sys

import numpy as np
import pytest
import ranking
import retrieval_accuracy
from helpers import ROOT
from test_convert import Qemb


MODEL = ROOT / "tests/fixtures/small.qemb"
EMULATED = ROOT / "build/release/qemb-emulated"
WORDS = "apple boat chess drum eagle flute grape horse".split()
# In the place of the emulated GPU: the CPU's program in arithmetics that it has. Logs its options.
GPU = r"""#!/bin/sh
echo "$@" >>"$0.log"
exec {} $(printf "%s\n" "$@" | sed "s/^f16$/f32/; s/^fp8$/int8/")
"""


# ---- figures -----------------------------------------------------------------------------------


def test_figures_of_known_rankings():
    rankings = [[2, 0, 1], [0, 1, 2], [1], [], [3, 4, 5, 6, 7, 8]]
    judged = ranking.judge(rankings, [{0, 1}, {0}, {2}, {1}, {8}])
    assert judged.ranks.tolist() == [2, 1, 0, 0, 6]
    assert judged.firsts.tolist() == [2, 0, 1, -1, 3]
    assert ranking.top(judged.ranks, 1) == pytest.approx(1 / 5)
    assert ranking.top(judged.ranks, 5) == pytest.approx(2 / 5)
    assert ranking.mrr(judged.ranks) == pytest.approx((1 / 2 + 1 + 1 / 6) / 5)
    other = ranking.judge([[0], [1, 0], [1], [0], [8]], [{0, 1}, {0}, {2}, {1}, {8}])
    assert ranking.compare(other, judged) == (2, 1, 4)


def test_the_interval_is_wilsons():
    # 8 of 10: z = 1.96, (0.8 + z^2/20 -+ z sqrt(0.16/10 + z^2/400)) / (1 + z^2/10)
    assert ranking.wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = ranking.wilson(0.0, 50)  # rounding must not make it -0.0 %
    assert low == 0 and high == pytest.approx(0.0714, abs=1e-4)  # z^2 / (50 + z^2)


def test_cosine_ignores_lengths_and_equal_scores_keep_the_documents_order():
    documents = [[0, 5], [1, 1], [9, 0], [2, 2], [0, 1]]
    assert ranking.by_cosine([[0, 2], [3, 0]], documents).tolist() == [[0, 4, 1, 3, 2],
                                                                       [2, 1, 3, 0, 4]]


def test_bm25_finds_words_and_nothing_without_one():
    documents = ["plays music files", "edits pictures", "music, pictures", "edits pictures"]
    queries = ["a player of MUSIC?", '"quoted" OR near* picture', "database", "?", "editing"]
    found = ranking.by_bm25(queries, documents)
    assert sorted(found[0]) == [0, 2] and sorted(found[1]) == [1, 2, 3]
    assert found[2:] == [[], [], [1, 3]]  # equal scores: in the documents' order


def test_a_sample_keeps_the_queries_that_it_answers():
    queries = [ranking.Query("s", frozenset(a), str(a)) for a in ({0, 1}, {3}, {4}, {1, 5})]
    corpus = ranking.Corpus("documents", {c: i for i, c in enumerate("abcde")}, list("abcde"),
                            queries)
    small, where = ranking.sample(corpus, 2)
    assert small.texts == ["a", "c", "e"] and where == [0, 2]
    assert small.ids == {"a": 0, "c": 1, "e": 2}
    assert [q.accepted for q in small.queries] == [{0}, {2}]


def test_the_int8_file_is_the_converters(tmp_path):
    """Equal but for the provenance, which names the dtypes."""
    for dtype in ("f16", "int8"):
        subprocess.run([sys.executable, ROOT / "convert_weights.py", ROOT / "tests/golden/hf-tiny",
                        "--dtype", dtype, "-q", "--out", tmp_path / dtype], check=True)
    retrieval_accuracy.write_int8_file(tmp_path / "f16", tmp_path / "got")
    want, got = Qemb(tmp_path / "int8"), Qemb(tmp_path / "got")
    assert got.config == want.config and got.bits == want.bits
    assert (got.rope_theta, got.norm_eps) == (want.rope_theta, want.norm_eps)
    for name in want.sections.keys() - {"provenance"}:
        assert got.sections[name].tobytes() == want.sections[name].tobytes(), name
    assert retrieval_accuracy.has_int8_weights(tmp_path / "got")
    assert not retrieval_accuracy.has_int8_weights(tmp_path / "f16")


# ---- the program -------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Eight documents, a query for each in one of two sets, and two needs in four packages."""
    def write(name, lines):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    write("documents.tsv", (f"{w}\tThe {w} is here\u2028and there." for w in WORDS))
    write("queries.tsv", (f"{'odd' if i % 2 else 'even'}\t{w}\t{w} here" for i, w
                          in enumerate(WORDS)))
    write("packages.txt", (f"{w} - a {w} - of wood" for w in WORDS[:4]))
    write("needs.tsv", ("a thing that floats\tboat", "fruit or game\tapple chess"))
    np.savez(tmp_path / "v.npz", documents=np.eye(8), documents_queries=2 * np.eye(8))
    (tmp_path / "gpu").write_text(GPU.format(ROOT / "qemb"))
    (tmp_path / "gpu").chmod(0o755)
    return tmp_path


def read_tables(markdown):
    """{title: rows of cells}"""
    parts = markdown.split("**")[1:]
    return {title: [[cell.strip() for cell in line.split("|")[1:-1]]
                    for line in table.splitlines() if line.startswith("|")][2:]
            for title, table in zip(parts[::2], parts[1::2])}


def options(data, *args):
    files = [f"--{n}={data}/{n}.tsv" for n in ("documents", "queries", "needs")]
    return ["--model", str(MODEL), *files, f"--packages={data}/packages.txt", f"--gpu={data}/gpu",
            *args]


def measure(data, *args):
    program = ROOT / "tests" / "retrieval" / "retrieval_accuracy.py"
    return subprocess.run([sys.executable, program, *options(data, *args)], capture_output=True,
                          text=True, timeout=120)


def refusal(data, *args):
    """What main, called here, since a new process takes longer than the test, exits with."""
    with pytest.raises(SystemExit) as e:
        retrieval_accuracy.main(options(data, "--rows", "bm25", *args))
    assert "\n" not in e.value.code
    return e.value.code


@pytest.mark.skipif(not EMULATED.exists(), reason="build/release/qemb-emulated is not built")
def test_every_row_is_printed(data):
    r = measure(data, "--markdown", "--gpu-sample", "2", "--vectors", f"one hot={data}/v.npz",
                "--vectors", f"f32={data}/v.npz")  # a name that another row has
    assert r.returncode == 0, r.stderr
    tables = read_tables(r.stdout)
    assert list(tables) == [
        "even: 4 queries, 8 documents", "even: 4 queries, 4 documents (one in 2)",
        "odd: 4 queries, 8 documents", "needs: 2 queries, 4 documents",
        "needs: 1 queries, 2 documents (one in 2)",
        "all: 10 queries", "all: 5 queries (one in 2)"]
    rows = tables["odd: 4 queries, 8 documents"]
    assert [row[0] for row in rows] == ["f32", "int16", "bf16", "int8", "INT8 file, f32",
                                        "f32, 64 of 128 numbers", "f32, 32 of 128 numbers", "BM25",
                                        "one hot", "f32"]
    for row in rows[1:4]:  # a row is of the arithmetic that it names
        assert row[1].endswith("-" + row[0])
    assert {row[2] for row in rows[-3:]} == {"100.0"} and rows[-1][4:6] == ["100.0", "1.000"]
    whole = tables["all: 10 queries"]  # the two files have no vectors of needs
    assert [row[0] for row in whole] == [row[0] for row in rows[:-2]]
    for column in (2, 4):  # top-1, top-5
        shares = [float(tables[f"{name} documents"][0][column]) * n for name, n in
                  (("even: 4 queries, 8", 4), ("odd: 4 queries, 8", 4), ("needs: 2 queries, 4", 2))]
        assert whole[0][column] == f"{sum(shares) / 10:.1f}"
    sampled = tables["even: 4 queries, 4 documents (one in 2)"]
    assert [row[0] for row in sampled] == ["f32", "GPU, FP16", "GPU, FP8"]
    assert sampled[1][2:6] == sampled[0][2:6] and sampled[1][6:] == ["0"] * 3
    assert "queries won and lost" in r.stdout
    runs = (data / "gpu.log").read_text().splitlines()
    assert ["--query" in run for run in runs] == [False, True, False, True]
    assert [run.split().count("f16") for run in runs] == [1, 1, 0, 0]


def test_rows_sets_and_a_missing_gpu(data):
    r = measure(data, "--rows", "bm25", "gpu-f16", "--sets", "odd", "--gpu", "/nonexistent")
    assert r.returncode == 0, r.stderr
    lines = r.stdout.strip().splitlines()
    assert lines[0] == "odd: 4 queries, 8 documents"
    assert [line.split()[0] for line in lines[1:4]] == ["vectors", "f32", "BM25"]
    assert "The emulated GPU is left out" in r.stdout and "**" not in r.stdout


@pytest.mark.parametrize("name, line, message", [
    ("queries.tsv", "odd\tboat pear\tx", "queries.tsv:9: accepted id (got pear, want one of a"),
    ("queries.tsv", "odd\tboat", "queries.tsv:9: line (got 'odd\\tboat', want set\tids\tquery)"),
    ("needs.tsv", "a horse\thorse", "needs.tsv:3: accepted id (got horse, want one of a document)"),
    ("needs.tsv", "a horse\t", "needs.tsv:3: line (got 'a horse\\t', want query\tids)"),
    ("documents.tsv", "boat\tx", "documents.tsv:9: id (got boat again, want one of its own)"),
    ("packages.txt", "boat: x", "packages.txt:5: line (got 'boat: x', want id - text)"),
])
def test_a_wrong_file_is_refused_in_one_line(data, name, line, message):
    with open(data / name, "a", encoding="utf-8") as f:
        f.write(line + "\n")
    assert " ".join(message.split()) in refusal(data)


@pytest.mark.parametrize("args, message", [
    (["--sets", "odd", "wrong"], "--sets: set (got wrong, want even, needs, odd)"),
    (["--vectors", "x=/nonexistent"], "--vectors: array file (got x=/nonexistent: No such file"),
    (["--documents", "/nonexistent.tsv"], "/nonexistent.tsv: file (got No such file"),
    (["--model", "/nonexistent"], "/nonexistent"),
    (["--qemb", "/nonexistent"], "/nonexistent: program (got No such file"),
])
def test_wrong_options_are_refused_in_one_line(data, args, message):
    assert message in refusal(data, *args)


def test_other_vectors_must_be_as_many_as_the_texts(data):
    np.savez(data / "w.npz", documents=np.eye(7), documents_queries=np.eye(8))
    got = refusal(data, "--vectors", f"x={data}/w.npz")
    assert "documents and their queries (got (7, 8), want (8, 8))" in got
