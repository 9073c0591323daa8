"""The Python package and examples/python: `pip install` of a copy of the repository that is gone
afterwards, then the vectors of the program ./qemb, bit for bit; threads and processes; errors; and
the libraries that the examples serve."""
import ctypes
import functools
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, make, run, tables, vectors_of

DEMO = ROOT / "examples/demo.qemb"
TINY = ROOT / "tests/golden/hf-tiny.qemb"
EXAMPLES = ROOT / "examples/python"
VERSION = re.search(r'QEMB_VERSION "(.*)"', (ROOT / "qemb.h").read_text())[1]
LINES = (ROOT / "examples/packages.txt").read_text(encoding="utf-8").split("\n")[:-1]
# What would end a record of the line protocol, or a string in C.
HOSTILE = ["two\nlines", "a\r\nb", "NUL \0 inside", "", "\n", "Größe: 中文 🙂", "\u2028", "same",
           "same", " spaces ", "e\u0301"]
TEXTS = HOSTILE + LINES[:150]
OPTIONS = [({}, []), ({"query": True}, ["--query"]), ({"prompt": "document"}, ["--document"]),
           ({"instruct": "Find packages"}, ["--instruct", "Find packages"]),
           ({"dim": 100}, ["--dim", "100"]), ({"query": True, "dim": 1}, ["--query", "--dim", "1"])]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of a copy of the repository, which is removed. What is compiled is copied, too."""
    make("build/lib/libqemb.so")
    place = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".git", ".venv*", "build", "golden", "fixtures", "results",
                                      "*.qemb", "*.egg-info", "libqemb.so", "__pycache__")
    shutil.copytree(ROOT, place / "repository", symlinks=True, ignore=unwanted)
    shutil.copytree(ROOT / "build/lib", place / "repository/build/lib")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", place / "dist", "./python",
        cwd=place / "repository")
    shutil.rmtree(place / "repository")
    (made,) = (place / "dist").iterdir()
    return made


@pytest.fixture(scope="session")
def site(wheel, tmp_path_factory):
    """A directory with the installed package, for sys.path."""
    to = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", to, wheel)
    return to


@pytest.fixture(scope="session")
def qemb(site):
    sys.path.insert(0, str(site))
    import qemb as package
    assert Path(package.__file__).parent == site / "qemb"
    os.environ["PYTHONPATH"] = str(site)  # of the processes that tests start
    return package


@pytest.fixture
def model(qemb):
    with qemb.Model(DEMO) as opened:
        yield opened


@pytest.fixture(scope="session")
def script(qemb, tmp_path_factory):
    """Runs a program in a directory of its own -> its output."""
    place = tmp_path_factory.mktemp("script")

    def start(text, *args):
        (place / "program.py").write_text(text)
        return subprocess.run([sys.executable, "program.py", *map(str, args)], cwd=place,
                              check=True, timeout=300, stdout=subprocess.PIPE, text=True).stdout
    return start


of_program = functools.partial(vectors_of, model=DEMO)


def assert_bits(got, want):
    assert got.dtype == np.float32 and got.flags.c_contiguous and got.shape == want.shape
    assert (got.view(np.uint32) == want.view(np.uint32)).all()


# ---- the wheel -----------------------------------------------------------------------------------

def test_wheel_has_the_package_and_its_library(wheel):
    assert re.fullmatch(rf"qemb-{re.escape(VERSION)}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as z:
        names = [n for n in z.namelist() if ".dist-info/" not in n]
        assert sorted(names) == ["qemb/__init__.py", "qemb/_library.py", "qemb/libqemb.so",
                                 "qemb/py.typed"]
        (metadata,) = [n for n in z.namelist() if n.endswith("/METADATA")]
        assert re.findall("^Requires-Dist: (.*)$", z.read(metadata).decode(), re.M) == \
            ["numpy>=1.22"]


def test_library_needs_glibc_alone(site):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", site / "qemb/libqemb.so"))
    assert {re.sub(r"-.*|\.so.*", "", n) for n in needed} <= {"libc", "libm", "ld"}


def test_pip_install_in_a_clean_environment(wheel, tmp_path):
    """With what it needs from the index, away from the repository."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(tmp_path / "venv/bin/pip", "install", "-q", wheel)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = f"import qemb; print(qemb.Model({str(DEMO)!r}).embed(['a'])[0, 0])"
    out = run(tmp_path / "venv/bin/python", "-c", code, cwd=tmp_path, env=env)
    assert np.float32(out) == of_program(["a"])[0, 0]


def test_structures_are_those_of_the_header(qemb, tmp_path):
    from qemb import _library
    names = {"qemb_err": _library.Err, "qemb_options": _library.Options,
             "qemb_text_options": _library.TextOptions, "struct qemb_ops": _library.Table}
    lines, want = [], []
    for name, structure in names.items():
        for field, kind in structure._fields_:
            lines.append(f'printf("%zu %zu\\n", offsetof({name}, {field}), '
                         f"sizeof((({name} *)0)->{field}));")
            want.append(f"{getattr(structure, field).offset} {ctypes.sizeof(kind)}")
        if structure is not _library.Table:  # the first members
            lines.append(f'printf("%zu\\n", sizeof({name}));')
            want.append(f"{ctypes.sizeof(structure)}")
    begin = '#include "qemb.h"\n#include <stdio.h>\nint main(void) {\n'
    (tmp_path / "a.c").write_text(begin + "\n".join(lines) + "\n}\n")
    run("cc", "-I", ROOT, tmp_path / "a.c", "-o", tmp_path / "a")
    assert run(tmp_path / "a").splitlines() == want


def test_library_that_cannot_be_used(site, tmp_path):
    def said(library):
        p = subprocess.run([sys.executable, "-c", "import qemb"], capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(site), "QEMB_LIBRARY": str(library)},
                           check=False)
        return p.stderr.splitlines()[-1]
    assert re.match(r"ImportError: /none: cannot be used \(.*\); install", said("/none"))
    (tmp_path / "a.c").write_text('const char *qemb_version(void) { return "9"; }\n')
    run("cc", "-shared", "-fPIC", tmp_path / "a.c", "-o", tmp_path / "other.so")
    assert said(tmp_path / "other.so").endswith(
        f"other.so: another version (got 9, want {VERSION})")


# ---- vectors -------------------------------------------------------------------------------------

@pytest.mark.parametrize("table", tables())
def test_bits_of_every_table(qemb, table):
    with qemb.Model(DEMO, cpu=table) as model:
        assert model.table == table and model.dim == 256
        for options, flags in OPTIONS:
            assert_bits(model.embed(TEXTS, **options), of_program(TEXTS, "--cpu", table, *flags))


@pytest.mark.parametrize("math", [None, "f32", "int16", "bf16", "int8"])
def test_math_chooses_the_programs_table(qemb, math):
    flags = ["--math", math] if math else []
    info = run(ROOT / "qemb", "info", "-m", DEMO, *flags)
    with qemb.Model(DEMO, math=math) as model:
        assert model.table == re.search(r"^table +([^ ,]+)", info, re.M)[1]
        assert_bits(model.embed(TEXTS), of_program(TEXTS, *flags))


def test_cpu_and_math_are_refused_with_what_there_is(qemb):
    def refused(**options):
        with pytest.raises(qemb.Error) as e:
            qemb.Model(DEMO, **options)
        assert (e.value.code, e.value.index) == ("usage", None)
        return str(e.value)
    assert refused(cpu="mmx") == f"cpu: not on this machine (got mmx, want {', '.join(tables())})"
    assert refused(math="f64") == \
        "math: no such arithmetic (got f64, want f32, bf16, int16, int8)"
    assert "than that of cpu avx2-int8" in refused(cpu="avx2-int8", math="f32") \
        or "avx2-int8" not in tables()
    assert refused(max_tokens=2049).endswith("(got 2049, want 1..2048)")
    assert refused(max_tokens=0).startswith("max_tokens: out of range (got 0")
    assert refused(threads=-1) == "threads: out of range (got -1, want 1..4096)"


def test_another_models_prompts(qemb):
    voyage = ROOT / "tests/golden/voyage.qemb"
    with qemb.Model(voyage) as model:
        assert model.prompts["document"] == "Represent the document for retrieval: "
        assert_bits(model.embed(TEXTS[:9], prompt="document"),
                    of_program(TEXTS[:9], "--document", model=voyage))
        with pytest.raises(qemb.Error, match="have none") as e:
            model.embed(["a"], instruct="Find packages")
        assert e.value.code == "no_task"


def test_long_lists_and_other_containers(model):
    many = [f"{text} {i}" for i in range(12) for text in LINES]  # more than one chunk
    want = of_program(many)
    assert_bits(model.embed(many), want)
    assert_bits(model.embed(text for text in many[:100]), want[:100])
    assert_bits(model.embed(np.array(many[:100])), want[:100])
    assert_bits(model.embed([]), np.empty((0, 256), np.float32))
    assert_bits(model.embed([], dim=7), np.empty((0, 7), np.float32))
    bad = []
    several = many[:4500] + ["\ud800"] + many[4500:]
    got = model.embed(several, on_error=bad.append)
    assert [e.index for e in bad] == [4500]
    assert_bits(np.delete(got, 4500, 0), want)


def test_truncation(qemb):
    long = ["a b c d e f g h i j", "short"]
    with qemb.Model(DEMO, max_tokens=5, truncate=True) as cut:
        assert cut.max_tokens == 5
        assert_bits(cut.embed(long), of_program(long, "--max-tokens", "5", "--truncate"))


# ---- errors --------------------------------------------------------------------------------------

def test_texts_that_fail(model, qemb):
    texts = ["good", "a " * 3000, "\udcff", "better"]
    with pytest.raises(qemb.Error) as e:
        model.embed(texts)
    assert (e.value.code, e.value.index) == ("too_long", 1)
    assert str(e.value).startswith("texts[1]: too long (got more than 2047 tokens")
    again = pickle.loads(pickle.dumps(e.value))
    assert (again.code, again.index, str(again)) == (e.value.code, 1, str(e.value))
    bad = []
    got = model.embed(texts, on_error=bad.append)
    assert [(b.code, b.index) for b in bad] == [("too_long", 1), ("invalid_utf8", 2)]
    assert np.isnan(got[1:3]).all()
    assert_bits(np.ascontiguousarray(got[::3]), of_program(["good", "better"]))


def test_mistakes_are_named(model, qemb):
    with pytest.raises(TypeError, match=r"texts: one text \(want a list: embed\(\[text\]\)\)"):
        model.embed("one text")
    with pytest.raises(TypeError, match=r"texts\[1\]: not a str \(got NoneType\)"):
        model.embed(["a", None])
    with pytest.raises(TypeError, match=r"texts\[0\]: not a str \(got bytes\)"):
        model.embed([b"a"])
    for options, says in [
            ({"dim": 0}, "dim: out of range (got 0, want 1..256)"),
            ({"dim": 257}, "dim: out of range (got 257, want 1..256)"),
            ({"query": True, "instruct": "x"}, "query, prompt and instruct: only one of them"),
            ({"prompt": "x"},
             "prompt: not one of the model's (got 'x', want one of: query, document)"),
            ({"instruct": ""}, "instruct: an empty task (leave it out for documents)"),
            ({"instruct": "a\0b"}, "instruct: NUL in the task (leave it out for documents)")]:
        for texts in [], ["a"]:
            with pytest.raises(qemb.Error) as e:
                model.embed(texts, **options)
            assert (str(e.value), e.value.index) == (says, None)
    with pytest.raises(qemb.Error, match="instruct: .*surrogates not allowed"):
        model.embed(["a"], instruct="\ud800")


def test_files_that_are_no_model(qemb, tmp_path):
    convert = "want a .qemb file; in qemb's source, make convert MODEL="
    for path, next_step in [(tmp_path / "none.qemb", convert), (ROOT / "qemb.h", convert),
                            (tmp_path, convert),
                            (ROOT / "tests/fixtures/reranker.qemb", "a reranker, which has no")]:
        with pytest.raises(qemb.Error) as e:
            qemb.Model(path)
        assert e.value.code == "model_file" and str(path) in str(e.value)
        assert next_step in str(e.value)
        assert (convert in str(e.value)) == (next_step == convert)


@pytest.mark.parametrize("more", [{"path": str(DEMO) + "\0x"}, {"cpu": "plain\0x"}])
def test_names_with_nul(qemb, more):
    """C would read them up to the NUL, and open another file."""
    with pytest.raises(qemb.Error, match="NUL in it"):
        qemb.Model(**{"path": DEMO, **more})


def test_closing(qemb):
    with qemb.Model(DEMO) as model:
        assert repr(model) == f"<qemb.Model '{DEMO}', dim 256, {model.table}>"
    model.close()
    assert repr(model).endswith(", closed>")
    for options in {}, {"instruct": "x"}:
        with pytest.raises(qemb.Error, match="the model is closed") as e:
            model.embed(["a"], **options)
        assert e.value.code == "closed"


def threads_of_this_process():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("threads", [None, 3])
def test_threads_and_their_end(qemb, threads):
    before = threads_of_this_process()
    model = qemb.Model(DEMO, threads=threads)
    want = threads or len(os.sched_getaffinity(0))
    assert threads_of_this_process() - before == want - 1  # one of them is the caller's
    assert_bits(model.embed(TEXTS), of_program(TEXTS))
    del model
    assert threads_of_this_process() == before


# ---- threads and processes -----------------------------------------------------------------------

def test_many_threads_share_a_model(model):
    parts = [TEXTS[i::8] for i in range(8)]
    got = [None] * 8

    def work(i):
        for _ in range(5):
            got[i] = model.embed(parts[i], query=i % 2 == 1)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, part in enumerate(parts):
        assert_bits(got[i], of_program(part, *["--query"] * (i % 2)))


def test_python_runs_while_the_library_computes(qemb):
    """In one call of the library, of one long text: a thread that sleeps and wakes needs the GIL
    for each step. With the GIL held it would take one or two, before and after the call."""
    ready, steps, ended = threading.Event(), [], threading.Event()

    def walk():
        ready.set()
        while not ended.is_set():
            time.sleep(0.0005)
            steps.append(1)
    with qemb.Model(DEMO, cpu="plain", threads=1) as model:
        text = ["word " * 2000]
        other = threading.Thread(target=walk)
        other.start()
        ready.wait()
        before = len(steps)
        model.embed(text)
        walked = len(steps) - before
        ended.set()
        other.join()
    assert walked >= 10


def test_a_short_list_does_not_wait_for_a_long_one(model):
    """The lock is free between two batches: while a thread embeds 4,000 texts, another one embeds
    one."""
    want = of_program(["short"])
    under_way, ends = threading.Event(), []

    def note(error):
        under_way.set()
        ends.append(error.index)
    long = ["\ud800", *(f"{text} {i}" for i in range(10) for text in LINES), "\ud800"]
    other = threading.Thread(target=model.embed, args=(long,), kwargs={"on_error": note})
    other.start()
    under_way.wait()
    short = model.embed(["short"])
    assert ends == [0]
    assert_bits(short, want)
    other.join()
    assert ends == [0, len(long) - 1]


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_pickled_model_in_other_processes(script, method):
    """multiprocessing sends the bound method, and with it the model."""
    out = script("""if True:
        import multiprocessing, pathlib, sys, qemb
        def main(path, method):
            model = qemb.Model(path, math="int16", max_tokens=7, truncate=True)
            texts = [f"text {i} \\n a b c d e f" for i in range(50)]
            want = model.embed(texts)
            with multiprocessing.get_context(method).Pool(2) as pool:
                parts = pool.map(model.embed, [texts[:20], texts[20:]], chunksize=1)
                assert (want[:20] == parts[0]).all() and (want[20:] == parts[1]).all()
                try:
                    pool.apply(model.embed, (["good", "\\ud800"],))
                except qemb.Error as e:
                    print(e.code, e.index)
        if __name__ == "__main__":
            main(*sys.argv[1:])
        """, DEMO, method)
    assert out == "invalid_utf8 1\n"


def test_a_forked_process_opens_the_model_again(script):
    """Also if it was forked while another thread had the lock: it must neither wait for that nor
    for the threads of the library, which it does not have. It ends as Python ends."""
    out = script("""if True:
        import os, sys, threading, qemb
        model = qemb.Model(sys.argv[1])
        texts = [f"text {i}" for i in range(3000)]
        want, stop = model.embed(texts[:10]), threading.Event()
        def work():
            while not stop.is_set():
                model.embed(texts)
        other = threading.Thread(target=work)
        other.start()
        for i in range(8):
            pid = os.fork()
            if not pid:
                good = (model.embed(texts[:10]) == want).all()
                if i % 2: model.close()
                sys.exit(0 if good else 1)
            print(os.waitpid(pid, 0)[1], flush=True)
        stop.set()
        other.join()
        pid = os.fork()
        if not pid:
            del model
            sys.exit(0)
        print(os.waitpid(pid, 0)[1], flush=True)
        assert (model.embed(texts[:10]) == want).all()
        """, DEMO)
    assert out == "0\n" * 9


def test_process_may_end_while_a_thread_computes(script):
    """Python does not wait for a daemon thread, so the model must not be freed at the end."""
    assert script("""if True:
        import sys, threading, qemb
        texts = [f"{i} " + "word " * 1000 for i in range(100)]
        for _ in range(4):
            model = qemb.Model(sys.argv[1])
            threading.Thread(target=model.embed, args=(texts,), daemon=True).start()
        print("end")
        """, DEMO) == "end\n"


def test_interrupt_ends_the_list_and_leaves_the_model(qemb, tmp_path):
    """The list alone would take minutes: the plain table, six million tokens."""
    program = tmp_path / "program.py"
    program.write_text("""if True:
        import sys, qemb
        model = qemb.Model(sys.argv[1], cpu="plain", threads=1)
        bad = lambda error: print("under way", flush=True)
        try:
            model.embed(["\\ud800", *(f"{i} " + "word " * 300 for i in range(20000))], on_error=bad)
        except KeyboardInterrupt:
            print(model.embed(["after"]).shape)
        """)
    with subprocess.Popen([sys.executable, program, DEMO], stdout=subprocess.PIPE, text=True) as p:
        try:
            assert p.stdout.readline() == "under way\n"
            p.send_signal(signal.SIGINT)
            assert p.communicate(timeout=120)[0] == "(1, 256)\n"
        finally:
            p.kill()
    assert p.returncode == 0


# ---- the examples --------------------------------------------------------------------------------

@pytest.fixture
def examples(qemb, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_search_prints_the_cosines(qemb, tmp_path):
    documents = ["Beijing is\na city.", "Größe: 中"]
    out = run(sys.executable, EXAMPLES / "search.py", DEMO, "capital of China", *documents,
              cwd=tmp_path)
    cosines = of_program(documents) @ of_program(["capital of China"], "--query")[0]
    assert out == "".join(f"{c:.4f}  {d}\n" for c, d in zip(cosines, documents))


def test_langchain(examples):
    from langchain_core.vectorstores import InMemoryVectorStore
    from langchain_embeddings import QembEmbeddings
    store = InMemoryVectorStore(QembEmbeddings(DEMO))
    store.add_texts(LINES)
    (found,) = store.similarity_search("play music from the terminal", k=1)
    assert found.page_content == "cmus - lightweight ncurses audio player"
    one = QembEmbeddings(DEMO, instruct="Find packages", dim=64)
    got = np.array([one.embed_query("music"), *one.embed_documents(["a\nb"])], np.float32)
    assert_bits(got[:1], of_program(["music"], "--instruct", "Find packages", "--dim", "64"))
    assert_bits(got[1:], of_program(["a\nb"], "--dim", "64"))


def test_langchains_own_tests(qemb, tmp_path):
    """langchain-tests, which its maintainers have for integrations."""
    (tmp_path / "test_standard.py").write_text(f"""if True:
        from langchain_embeddings import QembEmbeddings
        from langchain_tests.integration_tests import EmbeddingsIntegrationTests
        class TestQemb(EmbeddingsIntegrationTests):
            embeddings_class = QembEmbeddings
            embedding_model_params = {{"path": {str(DEMO)!r}}}
        """)
    path = os.pathsep.join([str(EXAMPLES), os.environ["PYTHONPATH"]])
    p = subprocess.run([sys.executable, "-m", "pytest", "-q", "--asyncio-mode=auto", tmp_path],
                       cwd=tmp_path, text=True, env=os.environ | {"PYTHONPATH": path},
                       capture_output=True, check=False)
    assert p.returncode == 0 and re.search(r"[1-9] passed", p.stdout), p.stdout


def test_sentence_transformers_methods(examples):
    from sentence_transformer import QembTransformer
    model = QembTransformer(DEMO)
    assert_bits(model.encode(TEXTS, batch_size=8, show_progress_bar=False), of_program(TEXTS))
    assert_bits(model.encode_query(TEXTS), of_program(TEXTS, "--query"))
    assert_bits(model.encode_document(TEXTS), of_program(TEXTS, "--document"))
    assert_bits(model.encode(["b"], prompt="a\n"), of_program(["a\nb"]))
    assert_bits(model.encode("one", truncate_dim=9), of_program(["one"], "--dim", "9")[0])
    assert_bits(model.encode(["word " * 3000]), of_program(["word " * 3000], "--truncate"))
    a, b = model.encode(LINES[:3]).astype(float), model.encode(LINES[3:8]).astype(float)
    # Numbers of a vector are rounded to float32, so its length is 1 within 2^-24, and the product
    # of two differs from their cosine by 2^-23 of it. 1,000 roundings of double are below 2^-40.
    bound = 2**-23 + 2**-40
    assert np.abs(model.similarity(7 * a, b) - a @ b.T).max() <= bound
    assert np.abs(model.similarity_pairwise(a, b[:3]) - (a * b[:3]).sum(1)).max() <= bound
    for options in {"precision": "int8"}, {"output_value": "token_embeddings"}:
        with pytest.raises(ValueError, match="not supported"):
            model.encode(["a"], **options)


def test_semhash_takes_it_as_an_encoder(examples):
    """A library that takes a SentenceTransformer, without torch: it finds near-duplicates."""
    from semhash import SemHash
    from sentence_transformer import QembTransformer
    hashed = SemHash.from_records(LINES, model=QembTransformer(DEMO))
    again = [f"{line}." for line in LINES[:20]]
    found = hashed.deduplicate(again, threshold=0.9)
    assert not found.selected and len(found.filtered) == 20
    for duplicate in found.filtered:
        assert duplicate.record == f"{duplicate.duplicate_of}."
