#!/usr/bin/env python3
"""sentence-transformers with PyTorch on the CPU, for an encoder such as bge-m3.

To install: the Python packages torch and sentence-transformers. Weights: MODEL is the directory
that convert_weights.py made qemb's file from, float32. qemb's file has them rounded to FP16, which
changes no speed. The model's own modules compute the vectors, from the ids that tokenizer.json
gives."""

import peer
import torch
from sentence_transformers import SentenceTransformer


def main():
    o = peer.arguments(__doc__).parse_args()
    torch.set_num_threads(o.threads)
    model = SentenceTransformer(str(o.model), device="cpu").eval()

    def embed(ids, lengths):
        mask = torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None]
        with torch.inference_mode():
            return model({"input_ids": torch.from_numpy(ids), "attention_mask": mask.long()})[
                "sentence_embedding"].numpy()

    return peer.run(o, embed)


if __name__ == "__main__":
    main()
