#!/usr/bin/env python3
"""A Hugging Face directory with the shape and the files of a real Qwen3-Embedding, weights random.

For tests and timings at full size where the real weights are not at hand: the vectors mean nothing,
the sizes, the file layout and the scale of the activations are right. Fixed seed: the same options
give the same bytes. Needs numpy; about 300 MB of memory at any size.
"""
import argparse
from pathlib import Path

import hf_fixture as hf


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", help="directory to make")
    p.add_argument("--shape", choices=list(hf.SHAPES), default="0.6B")
    p.add_argument("--tokenizer", required=True, metavar="PATH", help="the real tokenizer.json")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--layers", type=int, help="fewer layers than the shape has")
    p.add_argument("--massive", action="store_true",
                   help="token 0 gets massive activations in layer 1 (see hf_fixture.Massive)")
    a = p.parse_args()
    s = hf.SHAPES[a.shape] | ({"layers": a.layers} if a.layers else {})
    tokenizer = Path(a.tokenizer).read_text(encoding="utf-8")
    hf.save_random_model(a.out, s, tokenizer, a.seed, massive=a.massive, tied=a.shape == "0.6B")


if __name__ == "__main__":
    main()
