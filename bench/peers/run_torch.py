#!/usr/bin/env python3
"""The reference library on the CPU: transformers with PyTorch.

To install: the Python packages torch and transformers. Weights: MODEL is the directory that
convert_weights.py made qemb's file from. Its BF16 numbers are exact in float32, and exact in qemb's
FP16 unless they are tiny, so both multiply by the same weights."""

import peer
import torch
from transformers import AutoModel


def main():
    p = peer.arguments(__doc__)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    model = AutoModel.from_pretrained(o.model, dtype=getattr(torch, o.dtype)).eval()

    def embed(ids, lengths):
        with torch.inference_mode():
            hidden = model(input_ids=torch.from_numpy(ids), use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(ids)), torch.from_numpy(lengths) - 1].float()
            return torch.nn.functional.normalize(last, dim=-1).numpy()

    return peer.run(o, embed)


if __name__ == "__main__":
    main()
