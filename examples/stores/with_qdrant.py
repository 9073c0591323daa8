#!/usr/bin/env python3
"""Lines of text to nearest neighbours with Qdrant: with_qdrant.py MODEL FILE QUESTION

pip install qdrant-client. Bytes that are not UTF-8 become U+FFFD, and a text that is too long is
cut: no line is lost. QdrantClient(":memory:") runs in this process; give it a server's URL, or
path="DIRECTORY" to keep the collection."""
import sys

import qemb
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams

model = qemb.Model(sys.argv[1], truncate=True)
texts = [line.strip() for line in open(sys.argv[2], encoding="utf-8", errors="replace")]
db = QdrantClient(":memory:")
db.create_collection("texts", VectorParams(size=model.dim, distance=Distance.COSINE))
db.upload_collection("texts", model.embed(texts), [{"text": text} for text in texts])
question = model.embed([sys.argv[3]], query=True)[0]
for point in db.query_points("texts", question, limit=5).points:
    print(f"{point.score:.4f}\t{point.payload['text']}")
