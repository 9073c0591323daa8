#!/usr/bin/env python3
"""Lines of text to nearest neighbours with FAISS: with_faiss.py MODEL FILE QUESTION

pip install faiss-cpu. Bytes that are not UTF-8 become U+FFFD, and a text that is too long is cut:
no line is lost. The inner product is the cosine, since vectors have length 1."""
import sys

import faiss
import qemb

model = qemb.Model(sys.argv[1], truncate=True)
texts = [line.strip() for line in open(sys.argv[2], encoding="utf-8", errors="replace")]
index = faiss.IndexFlatIP(model.dim)
index.add(model.embed(texts))
scores, found = index.search(model.embed([sys.argv[3]], query=True), 5)
for score, line in zip(scores[0], found[0]):
    print(f"{score:.4f}\t{texts[line]}")
