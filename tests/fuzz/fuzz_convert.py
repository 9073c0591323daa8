#!/usr/bin/env python3
"""Converts mutated checkpoints: fuzz_convert.py SECONDS [SEED]

Each one has a change or a few in its JSON files, its weights, or in what kind of files they are. It
must either be refused in one printable line that leaves no file, or give a file that qemb opens and
whose vectors are finite. Example i of a seed is always the same; a failure prints both.
test_convert_hostile runs some hundred of them.
"""
import argparse
import base64
import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/fixtures")]
import convert_weights  # noqa: E402
import encoder_fixture as ef  # noqa: E402
import hf_fixture as hf  # noqa: E402
import numpy as np  # noqa: E402

QEMB = os.path.abspath(os.environ.get("QEMB_BIN", ROOT / "qemb"))
SHAPE = dict(layers=2, hidden=24, heads=4, kv=2, hd=10, ffn=20, vocab=300, max=64)
MERGES = [("a", "b"), ("ab", "c"), ("Ġ", "t"), ("Ġt", "h")]
WEIGHTS, PICKLE, GGUF = "model.safetensors", "pytorch_model.bin", "tiny.gguf"
LIMIT = 120  # seconds until a conversion counts as hung

SCALARS = [None, True, False, 0, -1, 1, 2, 3, 63, 64, 65, 255, 256, 2**31, 2**32, 2**64, 10**400,
           0.5, 1.0, 1e-45, 1e300, -1e300, float("nan"), float("inf"), "", "a", "ab", "é", "\0",
           "\x1b]0;owned\x07\x1b[31m", "\x9b31m\u202e", "\ud800", "x" * 1023, "x" * 1024,
           "x" * 1025, "é" * 1024, "none", "last", "x\ny", [], {}, [[]], [None], {"a": None}]
NUMBERS = [float("nan"), float("inf"), -float("inf"), 0.0, 1e-45, 65504.0, 65505.0, 1e19, 1e38,
           -3e38, 6e-8]


def deep(n, kind):
    return b"[" * n + b"]" * n if kind else b'{"a":' * n + b"1" + b"}" * n


def save_base(folder):
    """A sound checkpoint with every file that is read, in F32, so that any number fits."""
    folder.mkdir()
    hf.save_json(folder / "config.json", hf.config_json(SHAPE))
    hf.save_json(folder / "tokenizer.json", hf.tokenizer_json(MERGES, (hf.EOS, "<think>", "é中")))
    hf.save_sentence_transformers(folder, SHAPE["hidden"])
    hf.save_json(folder / "tokenizer_config.json", {
        "eos_token": hf.EOS, "model_max_length": 64, "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {"261": {"content": "<think>", "normalized": False}}})
    hf.save_json(folder / "sentence_bert_config.json", {"max_seq_length": 32})
    hf.save_json(folder / "added_tokens.json", {"<think>": 261})
    hf.save_json(folder / "special_tokens_map.json", {"eos_token": hf.EOS})
    tensors = hf.random_tensors(SHAPE, 7, "F32")
    tensors = {name: (d, shape, [b"".join(blocks)]) for name, (d, shape, blocks) in tensors.items()}
    hf.save_safetensors(folder / WEIGHTS, tensors)
    hf.save_gguf(folder / GGUF, hf.gguf_keys(SHAPE, MERGES), {
        name.removeprefix("model."): np.frombuffer(blocks[0], "<f4").reshape(shape)
        for name, (_, shape, blocks) in tensors.items()}, "F32")


def save_encoder_base(folder):
    """A sound XLM-RoBERTa whose weights are a pytorch_model.bin, in F32."""
    ef.save_directory(folder)
    (folder / WEIGHTS).unlink()
    ef.save_bin(folder / PICKLE, ef.random_arrays(ef.SHAPE, 7))


# ---- mutations ---------------------------------------------------------------------------------


def places(j):
    """Every (container, key) in a JSON value."""
    found, todo = [], [j]
    while todo:
        here = todo.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here))
        found += [(here, key) for key in keys]
        todo += [here[key] for key in keys if isinstance(here[key], (dict, list))]
    return found


def change_json(rng, j):
    """Changes one place of j."""
    found = places(j)
    if not found:
        return rng.choice(SCALARS)
    here, key = rng.choice(found)
    kind = rng.randrange(6)
    if kind == 0:
        del here[key]
    elif kind == 1 and isinstance(here[key], (int, float)):
        here[key] = here[key] * rng.choice([2, -1, 0.5]) + rng.choice([0, 1, -1])
    elif kind == 2:
        there, other = rng.choice(found)
        here[key], there[other] = json.loads(json.dumps(there[other])), here[key]
    elif kind == 3 and isinstance(here, dict):
        here[rng.choice(["x", "\x1b[2J", "\ud800", "é" * 99, *here])] = rng.choice(SCALARS)
    elif kind == 3:
        here.insert(key, json.loads(json.dumps(here[key])))
    elif kind == 4 and isinstance(here, dict):
        here[str(key) + rng.choice(["x", "\x1b", " "])] = here.pop(key)
    else:
        here[key] = rng.choice(SCALARS)
    return j


def change_bytes(rng, b):
    kind, at = rng.randrange(4), rng.randrange(len(b) + 1)
    if kind == 0:
        return b[:at]
    if kind == 1:
        return b[:at] + bytes([rng.randrange(256)]) + b[at + 1 :]
    if kind == 2:
        return b[:at] + rng.randbytes(rng.randrange(1, 9)) + b[at:]
    return deep(rng.choice([100, 900, 5000, 200000]), rng.randrange(2))


def split_weights(b):
    n = int.from_bytes(b[:8], "little")
    return json.loads(b[8 : 8 + n]), b[8 + n :]


def join_weights(header, data):
    h = json.dumps(header).encode()
    return struct.pack("<Q", len(h)) + h + data


def change_weights(rng, b):
    kind = rng.randrange(5)
    header, data = split_weights(b)
    if kind == 0:
        return change_bytes(rng, b)
    if kind == 1:
        return join_weights(change_json(rng, header), data)
    names = [name for name in header if name != "__metadata__"]
    low, high = header[rng.choice(names)]["data_offsets"]
    data = bytearray(data)
    if kind == 2:  # a whole tensor
        data[low:high] = struct.pack("<f", rng.choice(NUMBERS)) * ((high - low) // 4)
        return join_weights(header, bytes(data))
    for _ in range(rng.choice([1, 3, 50])):
        at = low + 4 * rng.randrange((high - low) // 4)
        data[at : at + 4] = struct.pack("<f", rng.choice(NUMBERS))
    return join_weights(header, bytes(data))


def change_pickle(rng, path):
    """Most changes go to data.pkl, some to the numbers, some to the zip around them."""
    kind = rng.random()
    if kind < 0.3:
        b = path.read_bytes()
        at = rng.randrange(len(b)) if kind < 0.1 else len(b) - rng.randrange(1, 2000)
        path.write_bytes(b[:at] + change_bytes(rng, b[at : at + 64]) + b[at + 64 :])
        return
    with zipfile.ZipFile(path) as z:
        members = {m.filename: z.read(m) for m in z.infolist()}
    names = [name for name in members if (name == "archive/data.pkl") == (kind < 0.8)]
    name = rng.choice(names)
    b = bytearray(members[name])
    for _ in range(rng.choice([1, 1, 3])):
        at = rng.randrange(len(b)) // 4 * 4
        b[at : at + 4] = (struct.pack("<f", rng.choice(NUMBERS)) if kind > 0.9 else
                          change_bytes(rng, bytes(b[at : at + 4])))
    with zipfile.ZipFile(path, "w") as z:
        for member, data in members.items():
            z.writestr(member, bytes(b) if member == name else data)


def change_unigram(rng, j):
    """Most changes go to what stands beside the pieces."""
    vocab, steps = j["model"].pop("vocab"), j["normalizer"]["normalizers"]
    kind = rng.randrange(4)
    if kind == 0:
        charsmap = bytearray(base64.b64decode(steps[0]["precompiled_charsmap"]))
        for _ in range(rng.choice([1, 5, 50])):
            charsmap[rng.randrange(len(charsmap))] = rng.choice([0, 1, 128, rng.randrange(256)])
        steps[0]["precompiled_charsmap"] = base64.b64encode(charsmap).decode()
    elif kind == 1:
        change_json(rng, vocab)
    else:
        change_json(rng, j)
    j["model"]["vocab"] = vocab
    return j


def long_tokens(rng, j):
    """Merges and added tokens around the loader's limit of 1,024 bytes."""
    token, vocab = "a", j["model"]["vocab"]
    merges, added = [], j["added_tokens"]
    for i in range(rng.choice([9, 10, 11])):
        merges.append([token, token])
        token += token
    if rng.randrange(2):
        merges.append([token, "a"])
        token += "a"
    for t in [t for t in vocab if vocab[t] >= 256]:
        del vocab[t]
    j["model"]["merges"] = merges
    vocab.update({a + b: 256 + i for i, (a, b) in enumerate(merges)})
    for i, t in enumerate(added):
        t["id"] = 280 + i
    j["post_processor"] = None
    if rng.randrange(2):
        added[-1]["content"] = rng.choice(["x", "é"]) * rng.choice([511, 512, 513, 1024, 1025])
    return j


def change_kind(rng, path):
    """Puts something else in the place of a file."""
    path.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind < 5:
        path.symlink_to(["/dev/zero", "/nonexistent", path.name][kind - 2])


# What a second change meets in a file that the first has damaged: it is left as it is.
DAMAGED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError,
           RecursionError, struct.error, zipfile.BadZipFile, NotImplementedError)


def mutate_gguf(rng, path):
    """Most changes go to the keys, which stand first."""
    b = path.read_bytes()
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(12000 if rng.random() < 0.9 else len(b))
        b = b[:at] + change_bytes(rng, b[at : at + 64]) + b[at + 64 :]
    path.write_bytes(b)


def mutate(rng, folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != GGUF)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path = rng.choice(files)
        if not path.is_file():
            continue
        kind = rng.random()
        if kind < 0.05:
            change_kind(rng, path)
        elif path.name in (WEIGHTS, PICKLE) or kind > 0.75:
            weights, pickle = folder / WEIGHTS, folder / PICKLE
            with contextlib.suppress(*DAMAGED):
                if weights.is_file():
                    weights.write_bytes(change_weights(rng, weights.read_bytes()))
                elif pickle.is_file():
                    change_pickle(rng, pickle)
        elif kind < 0.1:
            path.write_bytes(change_bytes(rng, path.read_bytes()))
        else:
            with contextlib.suppress(*DAMAGED):
                j = json.loads(path.read_bytes())
                change, rare = change_json, rng.random() < 0.2
                if path.name == "tokenizer.json" and (folder / PICKLE).exists():
                    change = change_unigram
                elif path.name == "tokenizer.json" and rare:
                    change = long_tokens
                path.write_text(json.dumps(change(rng, j)))


# ---- one example -------------------------------------------------------------------------------


def convert(source, dtype, out, qemb):
    """Returns the line with which it is refused, or None. qemb: the program that checks, or what
    does not exist."""
    said, plain = io.StringIO(), (sys.argv, convert_weights.QEMB)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    sys.argv = ["convert_weights.py", str(source), "--out", str(out), "--dtype", dtype]
    convert_weights.QEMB = qemb
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            convert_weights.main()
    except SystemExit as e:
        assert isinstance(e.code, str) and said.getvalue() == "", (e.code, said.getvalue())
        return e.code
    finally:
        sys.argv, convert_weights.QEMB = plain
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return None


def embed(model):
    records = [{"text": t} for t in ("a", "the abc <think>", "中文 \U0001f600 é", "1 2 3\n")]
    data = "".join(json.dumps(r) + "\n" for r in records).encode()
    return subprocess.run([QEMB, "-m", model, "--truncate", "--input", "jsonl", "--threads", "1"],
                          input=data, capture_output=True, timeout=LIMIT, check=False)


def hung(*_):
    raise AssertionError("the conversion hangs")


def run_example(base, folder, seed, i):
    """Returns what became of it: "refused", "good" or "not finite". Asserts what is promised."""
    rng, out = random.Random(f"{seed} {i}"), folder / "out.qemb"
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(base, source)
    if rng.random() < 0.2 and (base / GGUF).exists():
        source = source / GGUF
        mutate_gguf(rng, source)
    else:
        mutate(rng, source)
    dtype = rng.choice(["f16", "int8"])
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(LIMIT)
    said = convert(source, dtype, out, "/nonexistent")
    signal.alarm(0)
    if said is not None:
        assert said.startswith("convert_weights.py: ") and said.isprintable(), said
        assert len(said) < 2100, said
        assert os.listdir(folder) == ["source"], os.listdir(folder)
        return "refused"
    done = embed(out)
    out.unlink()
    assert done.returncode in (0, 3), (done.returncode, done.stderr)  # the loader opens it
    codes = {json.loads(line)["error"]["code"] for line in done.stdout.splitlines()
             if b'"error"' in line}
    if "non_finite" not in codes:  # others: texts without tokens, where nothing ends a text
        return "good"
    said = convert(source, dtype, out, Path(QEMB))
    if said is not None:
        assert said.startswith("convert_weights.py: weights: vectors of short texts "), said
    out.unlink(missing_ok=True)
    return "not finite"


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    p.add_argument("seconds", type=float)
    p.add_argument("seed", nargs="?", default=str(time.time_ns()))
    args = p.parse_args()
    until, counts, i = time.monotonic() + args.seconds, {}, 0
    with tempfile.TemporaryDirectory() as scratch:
        bases, folder = [Path(scratch, "base"), Path(scratch, "encoder")], Path(scratch, "work")
        save_base(bases[0])
        save_encoder_base(bases[1])
        folder.mkdir()
        while time.monotonic() < until:
            try:
                result = run_example(bases[i % 2], folder, args.seed, i)
            except BaseException:
                print(f"fuzz_convert.py: seed {args.seed}, example {i}", file=sys.stderr)
                raise
            counts[result] = counts.get(result, 0) + 1
            i += 1
    print(f"{i} checkpoints of seed {args.seed}: {counts}")


if __name__ == "__main__":
    main()
