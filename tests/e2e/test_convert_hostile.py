"""Hostile and damaged checkpoints: one printable line, no file left, and nothing written that the
loader refuses or that gives no finite vectors. Sources and readers are those of test_convert."""
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import hf_fixture as hf
import numpy as np
import pytest
from helpers import QEMB, ROOT, SMALL, stdout_of, vectors_of
from test_convert import (HALFWAY, NO, PLAIN, Qemb, SHAPE, YES, convert, convert_weights, edit,
                          folder, put, refused, reranker, run, save, save_shards, setting,
                          stop_halfway, weights)  # folder, reranker: fixtures

sys.path.insert(0, str(ROOT / "tests/fuzz"))
import fuzz_convert  # noqa: E402


# ---- the loader's limits -----------------------------------------------------------------------


def test_mutated_checkpoints(tmp_path):
    """`make fuzz` runs more of them."""
    base, work = tmp_path / "base", tmp_path / "work"
    fuzz_convert.save_base(base)
    work.mkdir()
    found = {fuzz_convert.run_example(base, work, "test", i) for i in range(200)}
    assert found == {"refused", "good", "not finite"}


def c_number(text):
    number, _, shift = text.partition("<<")
    return int(number) << int(shift or 0)


def test_limits_are_the_loaders():
    source = "".join((ROOT / name).read_text() for name in ("lib/model_file.c", "tokenizer.c"))
    named = {name: c_number(value) for name, value in re.findall(
        r"^    ([A-Z_]+) = ([0-9]+(?: << [0-9]+)?),", source, re.M)}
    ranges = {name: (low, high) for name, low, high in re.findall(
        r'\{"(\w+)", &[\w>-]+, ([\w <]+), ([\w <]+)\}', source)}
    for name, _, low, high in convert_weights.FIELDS[:8]:
        c_low, c_high = ranges[name]
        assert (c_number(c_low), named.get(c_high) or c_number(c_high)) == (low, high), name
    assert c_number(ranges["dense_rows"][1]) == convert_weights.MAX_ROWS
    assert named["MAX_PROMPTS"] == convert_weights.MAX_PROMPTS
    assert named["TOKEN_MAX"] == convert_weights.MAX_TOKEN
    assert named["MERGES_MAX"] == convert_weights.MAX_MERGES


def doubled(n):
    """Merges whose last token has n bytes, for an n of 2^k or 2^k + 1."""
    merges, token = [], "a"
    while 2 * len(token) <= n:
        merges.append((token, token))
        token += token
    return merges + [(token, "a")] * (len(token) < n)


@pytest.mark.parametrize("n", [1024, 1025, 2048])
def test_the_longest_merge(folder, n):
    hf.save_json(folder / "tokenizer.json", hf.tokenizer_json(doubled(n), (hf.EOS,)))
    if n > 1024:
        assert re.fullmatch(r"tokenizer.json: merge 1\d, bytes of its token \(got "
                            rf"{n}, want at most 1024\)", refused(folder))
        return
    convert(folder)
    assert vectors_of(["a" * n], model="out.qemb").shape == (1, SHAPE["hidden"])


@pytest.mark.parametrize("text", ["x" * 1024, "é" * 512, "x" * 1025, "é" * 750])
def test_the_longest_added_token(folder, text):
    edit(folder / "tokenizer.json", setting("added_tokens", 1, "content", text))
    if len(text.encode()) > 1024:
        assert refused(folder).endswith(f"bytes (got {len(text.encode())}, want at most 1024)")
        return
    convert(folder)
    assert vectors_of([text], model="out.qemb").shape == (1, SHAPE["hidden"])


# ---- vectors that are not finite ---------------------------------------------------------------

NO_VECTOR = ("weights: vectors of short texts are zero or not finite: numbers are damaged, or do "
             "not fit together")


@pytest.mark.parametrize("name,value", [("norm", 3e38), ("layers.0.input_layernorm", 3e38),
                                        ("norm", 0.0), ("layers.1.post_attention_layernorm", 1e30)])
@pytest.mark.parametrize("dtype", ["f16", "int8"])
def test_refuses_weights_that_give_no_vector(folder, name, value, dtype):
    """Each number is finite; their products are not, or the vector is zero."""
    tensors = weights("F32")
    d, shape, _ = tensors[f"model.{name}.weight"]
    save(folder / "model.safetensors", tensors | {
        f"model.{name}.weight": (d, shape, np.full(shape, value, "<f4").tobytes())})
    assert refused(folder, "--dtype", dtype) == NO_VECTOR


def test_an_old_file_stays_when_vectors_are_not_finite(folder):
    convert(folder)
    before = Path("out.qemb").read_bytes()
    tensors = weights("F32")
    for i in range(SHAPE["hidden"]):
        put(tensors, "model.norm.weight", i, 3e38)
    save(folder / "model.safetensors", tensors)
    assert refused(folder, "--out", "out.qemb") == NO_VECTOR
    assert Path("out.qemb").read_bytes() == before


def program(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("text,says", [
    (None, "no, since qemb is not built here (make qemb)"),
    ("exit 1", "no, qemb ended with status 1: "),
    ("echo 'qemb: out of memory' >&2; exit 2", "no, qemb ended with status 2: out of memory"),
    ("kill -9 $$", "no, qemb ended with status -9: ")])
def test_it_says_what_was_not_checked(folder, tmp_path, monkeypatch, capsys, text, says):
    other = tmp_path / "other"
    monkeypatch.setattr(convert_weights, "QEMB", program(other, text) if text else other)
    convert(folder)
    assert f"\n  checked    {says}\n" in capsys.readouterr().out
    monkeypatch.undo()


def test_it_says_what_was_checked(folder, capsys):
    convert(folder)
    assert "\n  checked    3 texts by qemb\n" in capsys.readouterr().out


def test_refuses_what_qemb_cannot_open(folder, tmp_path, monkeypatch):
    other = program(tmp_path / "other", "echo 'qemb: x: \033[31msection' >&2; exit 2")
    monkeypatch.setattr(convert_weights, "QEMB", other)
    assert refused(folder) == (f"{other}: cannot open what was written; if it is an older one, "
                               "build it anew: x: \\x1b[31msection")


# ---- files of other kinds ----------------------------------------------------------------------

FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "modules.json",
         "1_Pooling/config.json", "2_Normalize/config.json", "config_sentence_transformers.json",
         "sentence_bert_config.json", "added_tokens.json", "special_tokens_map.json",
         "adapter_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", [*FILES, "model-00002-of-00003.safetensors",
                                  "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["FIFO", "directory", "/dev/zero", "nowhere", "itself"])
def test_refuses_other_kinds_of_files(folder, name, kind):
    """None of them blocks, fills the memory, or is taken for a file that is not there."""
    if "model" in name and name != "model.safetensors":
        save_shards(folder, weights())
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"nowhere": "/nonexistent", "itself": path.name}.get(kind, kind))
    message = refused(folder)
    if kind == "itself" and name != "adapter_config.json":
        assert message == f"{path}: Too many levels of symbolic links"
    elif name == "adapter_config.json":
        assert message.startswith(f"{name}: an adapter")
    else:
        assert message == f"{name}: " + ("no such file in the source" if kind == "nowhere" else
                                         "not a regular file")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_refuses_other_kinds_of_gguf(folder, make):
    make(folder.parent / "x.gguf")
    refused(folder.parent / "x.gguf")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a":' * 200_000, b"[" * 900 + b"]" * 900])
def test_refuses_deep_nesting(folder, name, data):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    assert refused(folder).startswith(f"{name}: ")


def test_refuses_a_huge_text_file(folder):
    with open(folder / "config.json", "r+b") as f:
        f.truncate(1 << 40)
    assert refused(folder) == ("config.json: too large (got 1099511627776 bytes, want at most "
                               "268435456)")


# ---- the terminal ------------------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\x7f"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202e\\x7f"


def test_control_characters_of_a_refusal(folder):
    save(folder / "model.safetensors", weights() | {EVIL: ("F32", (1,), bytes(4))})
    assert refused(folder) == f"{SHOWN}: no tensor of this model (got 1 extra, want none)"


def test_control_characters_of_the_summary(folder, capsys):
    edit(folder / "config_sentence_transformers.json", setting("prompts", EVIL, "x"))
    q = convert(folder, "--note", EVIL)
    said = capsys.readouterr().out
    assert f"prompts    query, document, {SHOWN}\n" in said and f"note       {SHOWN}\n" in said
    assert said.replace("\n", "").isprintable()
    assert q.prompts[EVIL] == "x" and f"note: {SHOWN}\n" in q.provenance
    p = subprocess.run([QEMB, "info", "-m", "out.qemb"], capture_output=True)
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", stdout_of(p))


def test_control_characters_of_a_path(folder):
    evil = folder.parent / EVIL
    evil.mkdir()
    assert refused(evil).startswith("config.json: ")
    other = folder.rename(folder.parent / ("x" + EVIL))
    (other / "model.safetensors").unlink()
    assert refused(other).startswith(f"{folder.parent}/x{SHOWN}: no weights (want ")


def test_a_long_name_is_cut(folder):
    save(folder / "model.safetensors", weights() | {"x" * 100_000: ("F32", (1,), bytes(4))})
    assert len(refused(folder)) < 2100


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_utf_8(folder, encoding):
    edit(folder / "config_sentence_transformers.json", setting("prompts", "中", "x"))
    r = subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, "--out", "out.qemb"],
                       capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert (r.returncode, r.stderr) == (0, b"") and b"document, \\u4e2d\n" in r.stdout


def test_no_reader_of_the_summary(folder):
    """As behind `| head -0`. The file is there."""
    read, write = os.pipe()
    os.close(read)
    r = subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, "--out", "out.qemb"],
                       stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (r.returncode, r.stderr) == (1, "convert_weights.py: standard output: Broken pipe\n")
    assert Qemb("out.qemb").use == PLAIN


def test_numbers_print_no_warnings(reranker):
    """NumPy's, here of yes - no, would be more lines."""
    tensors = weights("F32")
    put(tensors, "model.embed_tokens.weight", YES * SHAPE["hidden"], 3e38)
    put(tensors, "model.embed_tokens.weight", NO * SHAPE["hidden"], -3e38)
    save(reranker / "model.safetensors", tensors)
    r = subprocess.run([sys.executable, ROOT / "convert_weights.py", reranker], capture_output=True,
                       text=True)
    assert r.returncode == 1 and r.stderr == (
        f"convert_weights.py: model.embed_tokens.weight[{YES}, 0]: number (got inf, want a finite "
        "one up to 3.40282e+38)\n")


# ---- signals, and what a killed run leaves -----------------------------------------------------

LOADING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "safetensors":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["convert_weights.py", "/nonexistent"]
import runpy
runpy.run_path({script!r}, run_name="__main__")
"""


def test_an_interrupt_while_packages_load():
    script = LOADING.format(script=str(ROOT / "convert_weights.py"))
    r = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (r.returncode, r.stdout, r.stderr) == (-signal.SIGINT, "", "")


def interrupt_halfway(script, folder):
    """Runs the script, which prints "halfway" and then waits, and interrupts it there."""
    p = subprocess.Popen([sys.executable, "-c", script, folder, "--out", "out.qemb"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "halfway\n"
    p.send_signal(signal.SIGINT)
    _, err = p.communicate()
    assert (p.returncode, err) == (130, "convert_weights.py: stopped by SIGINT, nothing written\n")
    assert os.listdir() == []


def test_a_second_interrupt(folder):
    """It comes while the first one is obeyed."""
    script = HALFWAY.format(root=str(ROOT)).replace("c.main()", """
plain_handler = c.interrupt
def interrupt(*args):
    try:
        plain_handler(*args)
    finally:
        import os, signal
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
c.interrupt = interrupt
c.main()""")
    interrupt_halfway(script, folder)


def test_an_interrupt_while_qemb_checks(folder, tmp_path):
    """A terminal sends it to both."""
    slow = program(tmp_path / "slow", "echo halfway >&3\nexec sleep 600")
    script = (f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport convert_weights as c\n"
              f"import functools\nc.QEMB = {str(slow)!r}\n"
              "c.subprocess.run = functools.partial(c.subprocess.run, pass_fds=[3])\n"
              "import os\nos.dup2(1, 3)\nc.main()")
    interrupt_halfway(script, folder)


def test_nohup_is_obeyed(folder):
    """A signal that the caller ignores stays ignored."""
    script = HALFWAY.format(root=str(ROOT)).replace("time.sleep(600)", "time.sleep(0.1)")
    p = subprocess.Popen([sys.executable, "-c", script, folder, "--out", "out.qemb"],
                         stdout=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert p.stdout.readline() == "halfway\n"
    p.send_signal(signal.SIGHUP)
    p.communicate()
    assert p.returncode == 0 and Qemb("out.qemb").use == PLAIN


def test_what_a_killed_run_leaves_is_replaced(folder):
    Path("out.qemb").write_bytes(b"old")
    stop_halfway(folder, signal.SIGKILL)
    assert sorted(os.listdir()) == ["out.qemb", "out.qemb.tmp"]
    convert(folder)  # asserts that only out.qemb is there


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: Path(path).write_bytes(b"x")])
def test_another_thing_of_the_temporary_name(folder, make):
    make("out.qemb.tmp")
    convert(folder)


def test_a_link_of_the_temporary_name(folder, tmp_path):
    """It is not followed."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    os.symlink(victim, "out.qemb.tmp")
    message = refused(folder, "--out", "out.qemb")
    assert message == "out.qemb.tmp: Too many levels of symbolic links"
    assert victim.read_bytes() == b"mine"


def test_two_runs_at_a_time(folder):
    """The second one does not touch the file of the first."""
    with open("out.qemb.tmp", "wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(b"of another run")
        f.flush()
        assert refused(folder, "--out", "out.qemb") == "out.qemb.tmp: another run is writing it"
        assert Path("out.qemb.tmp").read_bytes() == b"of another run"
    run(folder, "--out", "out.qemb")
    assert os.listdir() == ["out.qemb"]


def test_qemb_beside_the_script_is_the_one_that_is_tested():
    assert convert_weights.QEMB == ROOT / "qemb" and os.path.exists(SMALL)
