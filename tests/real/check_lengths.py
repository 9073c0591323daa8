#!/usr/bin/env python3
"""Random XLM-RoBERTa models with bge-m3's 8,192 positions, texts of 2 to 8,192 tokens: qemb's float
tables beside transformers in double.

    check_lengths.py DIRECTORY      (`make check-real`; the directory gets the models)

Matrices are rounded to FP16 as in the .qemb. Prints the largest difference of a number of a unit
vector for each table and length, and transformers' own in float32. Exits with 1 if one of qemb's is
above the limit."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/fixtures"))
import encoder_golden  # noqa: E402
import hf_fixture as hf  # noqa: E402
import unigram_fixture  # noqa: E402

LIMIT = 2e-6
LENGTHS = 2, 3, 63, 64, 65, 129, 512, 513, 1025, 2048, 4097, 8191, 8192
MODELS = (encoder_golden.Encoder("first", 3, 64, 2, 96, "float32"),
          encoder_golden.Encoder("mean", 2, 64, 1, 96, "float32", mean=True))


def tables(model):
    """The float tables that this CPU can run."""
    for name in "plain", "avx2", "avx512", "amx":
        r = subprocess.run([ROOT / "qemb", "info", "-m", model, "--cpu", name, "--math", "f32"],
                           capture_output=True)
        if r.returncode == 0:
            yield name


def embed(model, table, texts):
    records = "".join(json.dumps({"ids": ids}) + "\n" for ids in texts)
    r = subprocess.run([ROOT / "qemb", "-m", model, "--cpu", table, "--math", "f32", "--input",
                        "jsonl", "--output", "f32"], input=records.encode(), capture_output=True)
    if r.returncode:
        sys.exit(r.stderr.decode())
    return np.frombuffer(r.stdout, "<f4").reshape(len(texts), -1).astype("f8")


def unit(v):
    return v / np.linalg.norm(v)


def check(m, folder, vocab):
    """Prints the rows of one model. Returns whether all are within the limit."""
    shutil.rmtree(folder, ignore_errors=True)
    m.shape["max"] = max(LENGTHS)
    encoder_golden.save_checkpoint(m, folder, json.dumps(unigram_fixture.tokenizer_json()), vocab)
    out = folder.with_suffix(".qemb")
    subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, "--quiet", "--out", out],
                   check=True)
    rng = hf.generator(10, m.name)
    texts = [[0, *map(int, rng.integers(0, vocab, n - 2)), 2] for n in LENGTHS]
    model = encoder_golden.load_rounded(m, folder)
    single = [unit(encoder_golden.vector_of(model, ids, m.mean).astype("f8")) for ids in texts]
    model.double()
    double = [unit(encoder_golden.vector_of(model, ids, m.mean)) for ids in texts]
    got = {"transformers": single} | {name: embed(out, name, texts) for name in tables(out)}
    good = True
    for by, vectors in got.items():
        off = [float(np.abs(a - b).max()) for a, b in zip(vectors, double, strict=True)]
        good &= by == "transformers" or all(x <= LIMIT for x in off)  # false for NaN, too
        print(f"| {m.name} | {by} | " + " | ".join(f"{x:.1e}" for x in off) + " |")
    return good


def main(folder):
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    vocab = len(unigram_fixture.pieces())
    print("| pooling | by | " + " | ".join(f"{n:,}" for n in LENGTHS) + " |\n"
          + "|---" * (2 + len(LENGTHS)) + "|")
    good = [check(m, Path(folder) / m.name, vocab) for m in MODELS]
    print("ok" if all(good) else f"FAILED: above {LIMIT:g}")
    return not all(good)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
