#!/usr/bin/env python3
"""Lines of text to nearest neighbours with DuckDB: with_duckdb.py MODEL FILE QUESTION

pip install duckdb. Bytes that are not UTF-8 become U+FFFD, and a text that is too long is cut:
no line is lost. The inner product is the cosine, since vectors have length 1. Give connect() a
file's name to keep the table."""
import sys

import duckdb
import qemb

model = qemb.Model(sys.argv[1], truncate=True)
texts = [line.strip() for line in open(sys.argv[2], encoding="utf-8", errors="replace")]
db = duckdb.connect()
db.execute(f"CREATE TABLE texts (text VARCHAR, vector FLOAT[{model.dim}])")
db.execute("INSERT INTO texts SELECT unnest(?), unnest(?)", [texts, model.embed(texts).tolist()])
nearest = f"""SELECT array_inner_product(vector, ?::FLOAT[{model.dim}]) AS score, text
              FROM texts ORDER BY score DESC LIMIT 5"""
for score, text in db.execute(nearest, [model.embed([sys.argv[3]], query=True)[0]]).fetchall():
    print(f"{score:.4f}\t{text}")
