#!/usr/bin/env python3
"""The reference library on a GPU: texts and tokens per second in FP16, a JSON line per length.

    bench_transformers.py 0.6B|4B|8B

The model has the shape of Qwen3-Embedding and random weights, drawn on the GPU. A batch has 16,384
tokens; all texts of a batch are equally long, so none is padded. Rates are of six batches after two
to warm up, with the vectors scaled to length 1 and left on the GPU. Exit status 77 without torch,
transformers or a GPU. tests/cuda/gpu_day.py runs it."""

import json
import sys
import time

try:
    import torch
    from transformers import AutoConfig, AutoModel
except ImportError as e:
    print(f"skipped: {e}")
    sys.exit(77)

# layers, hidden, heads, key heads, feed-forward size
SHAPES = {
    "0.6B": (28, 1024, 16, 8, 3072),
    "4B": (36, 2560, 32, 8, 9728),
    "8B": (36, 4096, 32, 8, 12288),
}
TOKENS, WARM, RUNS = 16384, 2, 6


def make_model(shape):
    layers, hidden, heads, key_heads, ffn = SHAPES[shape]
    config = AutoConfig.for_model(
        "qwen3", hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=128, intermediate_size=ffn, vocab_size=151665,
        max_position_embeddings=32768, use_cache=False)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        return AutoModel.from_config(config).eval()


def seconds(model, ids):
    """Of one batch."""
    with torch.inference_mode():
        for i in range(WARM + RUNS):
            if i == WARM:
                torch.cuda.synchronize()
                start = time.monotonic()
            last = model(input_ids=ids, use_cache=False).last_hidden_state[:, -1].float()
            torch.nn.functional.normalize(last, dim=-1)
        torch.cuda.synchronize()
    return (time.monotonic() - start) / RUNS


def main(shape):
    if not torch.cuda.is_available():
        print("skipped: no GPU")
        return 77
    model = make_model(shape)
    for n in (16, 32, 64, 128, 512):
        texts = TOKENS // n
        s = seconds(model, torch.randint(1000, 100000, (texts, n), device="cuda"))
        row = {"tokens": n, "texts_s": round(texts / s, 1), "tokens_s": round(texts * n / s)}
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
