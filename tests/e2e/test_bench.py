"""bench.sh, qemb-bench and accuracy: what they count and write. No test looks at a speed."""

import csv
import json
import subprocess
from pathlib import Path

import pytest

COLUMNS = ["group", "name", "n", "median", "p10", "p90", "unit", "percent", "limit", "counted"]
ROOT = Path(__file__).resolve().parents[2]
MODEL = "tests/fixtures/small.qemb"
BENCH = ROOT / "build/release/qemb-bench"

pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="build/release/qemb-bench is not built")


def bench_sh(out, *args):
    return subprocess.run(
        ["./bench.sh", "-o", str(out), "--threads", "2", "--rounds", "1", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def peer_run(out, *peers, tokens=32, lengths="16"):
    """bench.sh with --peer options alone, in f32."""
    parts = ["--only", "peer", "--tokens", str(tokens), "--lengths", lengths, "--math", "f32"]
    return bench_sh(out, *parts, *peers)


def rows(text):
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def tokens_of(lines):
    ids = subprocess.run(
        ["./qemb", "tokenize", "-m", MODEL],
        input=lines,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [len(json.loads(line)) for line in ids.stdout.splitlines()]


def test_a_peer_gets_the_texts_by_input_and_by_file(tmp_path):
    piped, named = tmp_path / "piped", tmp_path / "named"
    by_file = f"cat {{file}} >>{named}; echo {{threads}},{{length}} >>{tmp_path}/said"
    peers = ["--peer", f"cat >>{piped}", "--peer", by_file]
    r = peer_run(tmp_path / "r", *peers, tokens=256, lengths="16 64")
    assert r.returncode == 0, r.stderr
    assert piped.read_text() == named.read_text()
    # the first text alone, untimed; all texts of a length; the first one alone again
    lines = piped.read_text().splitlines()
    assert tokens_of(piped.read_text()) == [16] * (1 + 16 + 1) + [64] * (1 + 4 + 1)
    assert lines[0] == lines[1] == lines[17] and lines[18] == lines[19] == lines[23]
    assert lines[1].split()[0] != lines[2].split()[0]  # a batch shares no prefix
    assert (tmp_path / "said").read_text().split() == ["2,16"] * 3 + ["2,64"] * 3
    d = json.loads((tmp_path / "r/bench.json").read_text())
    assert [p[:3] for p in d["peers"]] == ["cat", "cat"]
    assert d["compiler"] and d["commit"] and d["machine"]
    got = rows((tmp_path / "r/bench.csv").read_text())
    assert len(got) == len(d["rows"]) == 2 * (2 + 2 * 2 + 2 * 2)
    for n in ("16", "64"):
        t = {x["name"]: float(x["median"]) for x in got if x["n"] == n and "whole run" in x["name"]}
        ratio = t["peer 2: whole run"] / t["qemb: whole run"]
        assert t["qemb against peer 2: whole run"] == pytest.approx(ratio, abs=0.001)


def test_a_ratio_names_its_arithmetic(tmp_path):
    r = peer_run(tmp_path, "--peer", "cat >/dev/null", "--math", "f32 int16")
    assert r.returncode == 0, r.stderr
    got = rows((tmp_path / "bench.csv").read_text())
    ours = [x["math"] for x in got if x["name"] == "qemb against peer 1: whole run"]
    assert ours == ["f32", "int16"]


def test_a_rate_is_empty_where_the_further_texts_take_no_time(tmp_path):
    # the first text alone takes longer than all of them
    peer = "if [ $(wc -l <{file}) = 1 ]; then sleep 0.3; fi"
    r = peer_run(tmp_path, "--peer", peer)
    assert r.returncode == 0, r.stderr
    d = {x["name"]: x["median"] for x in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert d["peer 1: rate"] is None and d["qemb against peer 1: rate"] is None
    assert d["peer 1: whole run"] > 0


def test_a_peer_that_takes_turns_stays_and_gets_a_line_a_call(tmp_path):
    said = tmp_path / "said"
    peer = tmp_path / "peer.sh"
    peer.write_text(
        f"echo $2 $(wc -l <$1) >>{said}\nwhile read x; do echo call >>{said}; echo loading; "
        "sleep 0.05; echo done; done\n"
    )
    r = peer_run(tmp_path / "r", "--peer", f"sh {peer} {{file}} {{threads}} --turns", tokens=64)
    assert r.returncode == 0, r.stderr
    started, *calls = said.read_text().splitlines()
    # started once, with all texts; a call to warm up, and at least two in each of three rounds
    assert started == "2 4" and set(calls) == {"call"} and len(calls) >= 1 + 3 * 2
    got = {x["name"]: x for x in rows((tmp_path / "r/bench.csv").read_text())}
    assert set(got) == {"qemb beside peer 1", "peer 1", "qemb of peer 1"}
    assert {x["math"] for x in got.values()} == {"f32"} and got["peer 1"]["unit"] == "tokens/s"
    ours, theirs = (float(got[x]["median"]) for x in ("qemb beside peer 1", "peer 1"))
    assert got["peer 1"]["n"] == "16" and ours > 0
    assert 0 < theirs <= 64 / 0.05  # the call ends with "done", not with another line


def test_append_keeps_rows_and_goes_on_counting_peers(tmp_path):
    for more in ([], ["--append"]):
        r = peer_run(tmp_path, "--peer", "cat", *more)
        assert r.returncode == 0, r.stderr
    names = {x["name"] for x in rows((tmp_path / "bench.csv").read_text())}
    assert {"peer 1: whole run", "peer 2: whole run"} <= names
    assert len(json.loads((tmp_path / "bench.json").read_text())["peers"]) == 2


def test_a_peer_that_fails_ends_the_run(tmp_path):
    r = peer_run(tmp_path, "--peer", "echo no such model >&2; exit 3")
    assert r.returncode == 1 and "no such model" in r.stderr
    r = peer_run(tmp_path, "--peer", "echo no such model >&2; exit 3 --turns")
    assert r.returncode == 1 and "no such model" in r.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (["--peer"], "bench.sh [-m"),
        (["--math", "int3"], "not on this machine"),
        (["--faster"], "bench.sh [-m"),
    ],
)
def test_what_it_does_not_know_is_refused(tmp_path, args, message):
    r = bench_sh(tmp_path, "--only", "", *args)
    assert r.returncode == 1 and message in r.stderr


def test_forward_counts_tokens_texts_and_shares():
    r = subprocess.run(
        [str(BENCH), "forward", MODEL, "16", "--tokens", "64", "--threads", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    got = list(csv.DictReader(r.stdout.splitlines(), COLUMNS))
    by = {(x["group"], x["name"]): float(x["median"]) for x in got}
    # 4 digits are printed
    assert by["forward", "tokens"] == pytest.approx(16 * by["forward", "texts"], rel=1e-3)
    assert sum(v for (group, _), v in by.items() if group == "share") == pytest.approx(100, abs=0.1)
    # 4 texts of 16 tokens; small.qemb: 4 layers of 128 -> (4 + 2 * 2) * 64, 4 * 64 -> 128 and 3 *
    # 192 * 128. In the last layer 4 rows go on after the keys and values, and 4 queries are asked.
    qkv, rest, T, B, L = 128 * 8 * 64, 4 * 64 * 128 + 3 * 192 * 128, 64, 4, 4
    linear = 2 * (L * T * qkv + (L - 1) * T * rest + B * rest)
    pairs = (L - 1) * B * (16 * 17 // 2) + B * 16
    flops = {"linear layers alone": linear, "all products": linear + 2 * 2 * 4 * 64 * pairs}
    for name, n in flops.items():
        assert by["forward", name] * 1e9 / by["forward", "tokens"] * T == pytest.approx(n, rel=1e-3)


@pytest.mark.parametrize("math", ["f32", "bf16"])
def test_the_forward_with_onednns_products_makes_the_same_vectors(math):
    if "dnnl" not in subprocess.run(["ldd", str(BENCH)], capture_output=True, text=True).stdout:
        pytest.skip("bench was built without oneDNN (make bench installs it)")
    tables = subprocess.run([str(BENCH), "tables"], capture_output=True, text=True, check=True)
    has_bf16 = "bf16 bf16" in tables.stdout
    if math == "bf16" and not has_bf16:
        pytest.skip("this CPU has no bfloat16")
    r = subprocess.run(
        [str(BENCH), "beside", MODEL, "16", "--tokens", "64", "--threads", "2", "--math", math],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert r.returncode == 0, r.stderr  # bench itself compares the vectors
    got = {
        x["name"]: x
        for x in csv.DictReader(r.stdout.splitlines(), COLUMNS)
        if x["group"] == "gemm"
    }
    for theirs in {"f32": ["f32", "bf16"], "bf16": ["bf16"]}[math]:
        if theirs == "bf16" and not has_bf16:
            continue
        assert got.pop(f"forward beside oneDNN {theirs}")["unit"] == "tokens/s"
        assert got.pop(f"forward: oneDNN {theirs}")["unit"] == "tokens/s"
        assert got.pop(f"forward of oneDNN {theirs}")["unit"] == "%"
    assert not got


@pytest.mark.parametrize("math", ["f32", "int16", "bf16", "int8"])
def test_exactly_the_arithmetic_that_was_asked_is_timed(math):
    """qemb may serve --math by a table that is more exact. That is not what a row of bench says."""
    tables = subprocess.run([str(BENCH), "tables"], capture_output=True, text=True, check=True)
    of_math = [name for name, m in map(str.split, tables.stdout.splitlines()) if m == math]
    for args in [["--math", math]] + [["--cpu", name] for name in of_math]:
        r = subprocess.run(
            [str(BENCH), "print", MODEL, "--threads", "1", *args],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if of_math:
            want = of_math[-1] if args[0] == "--math" else args[1]
            assert r.returncode == 0 and r.stderr == f"bench: table {want}\n"
        else:
            assert r.returncode == 1 and "another arithmetic would serve it" in r.stderr


def test_every_table_is_listed():
    r = subprocess.run([str(BENCH), "tables"], capture_output=True, text=True, check=True)
    assert r.stdout.splitlines()[0] == "plain f32"


def test_one_product_by_the_oracle_and_by_every_table():
    """docs/matmul.md's figures. Errors of y are relative to the sum of the terms' magnitudes."""
    r = subprocess.run(
        [str(BENCH), "matmul", MODEL, "--threads", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {
        r["name"]: r
        for r in csv.DictReader(r.stdout.splitlines(), COLUMNS)
        if r["group"] == "matmul"
    }
    tables = subprocess.run([str(BENCH), "tables"], capture_output=True, text=True, check=True)
    tables = dict(line.split() for line in tables.stdout.splitlines())
    assert list(rows) == [
        name + suffix for name in ("oracle", *tables) for suffix in ("", ": error")
    ]
    hidden = 128  # K of the small model
    # A sum of K products of floats, rounded K + 4 times at most, each by 2^-24 of the sum of
    # magnitudes. bfloat16 also rounds both factors, each by at most 2^-9 of itself. The error of
    # scaled integers has no bound relative to the magnitudes: there a number is enough, not NaN.
    f32 = (hidden + 4) * 2**-24
    bound = {"f32": f32, "bf16": f32 + 2**-8 + 2**-18, "int8": 1, "int16": 1}
    for name, math in tables.items():
        assert 0 < float(rows[name + ": error"]["median"]) <= bound[math], name
        assert float(rows[name]["median"]) > 0


# ---- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gqa2", "e5", "xlmr"])
def test_accuracy_compares_with_the_oracle_of_the_architecture(model):
    """Float rounds to some 1e-7; another formula, or other ids, would change the first digits."""
    r = subprocess.run([ROOT / "build/release/accuracy", ROOT / f"tests/golden/{model}.qemb"],
                       capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr
    (plain,) = (line.split("|") for line in r.stdout.splitlines() if "| plain |" in line)
    assert plain[1].strip() == f"{model}.qemb" and 0 < float(plain[5]) < 1e-5
