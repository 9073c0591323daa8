#!/usr/bin/env python3
"""models/demo.qemb: a model small enough to commit, with RANDOM weights and a real vocabulary.

It exists so that `make demo` and the tests of the program have a model without a network. Its
vectors have the right form and no meaning. The byte-level BPE vocabulary is trained on
models/demo.txt. Needs the packages of tests/requirements-golden.txt less torch and transformers.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import hf_fixture as hf
import train_bpe

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(layers=4, hidden=128, heads=4, kv=2, hd=64, ffn=192, vocab=0, max=2048)
VOCAB = 2560  # the model and the notes in the README want a file of about 2 MB


def main():
    out = ROOT / "models/demo.qemb"
    text = (ROOT / "models/demo.txt").read_text(encoding="utf-8")
    added = (hf.EOS, "<|im_start|>", "<|im_end|>")
    tokenizer = train_bpe.train(text.splitlines(keepends=True), VOCAB - len(added), added)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "qemb-demo"
        hf.save_random_model(folder, SHAPE | {"vocab": VOCAB}, tokenizer, seed=2)
        subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, "--out", out, "--note",
                        "random weights, untrained: the vectors mean nothing"], check=True)


if __name__ == "__main__":
    main()
