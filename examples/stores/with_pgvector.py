#!/usr/bin/env python3
"""Lines of text to nearest neighbours with PostgreSQL: with_pgvector.py MODEL FILE QUESTION

pip install psycopg[binary]. The server needs pgvector (Debian 13: postgresql-17-pgvector), and its
database once `CREATE EXTENSION vector`. libpq's variables say which: PGHOST, PGDATABASE, PGUSER.
Bytes that are not UTF-8 become U+FFFD, a text that is too long is cut, and NUL, which PostgreSQL
cannot store, becomes a space: no line is lost. The table lasts as long as the connection; without
TEMPORARY, and with db.commit(), it stays. <#> is the negative inner product; `CREATE INDEX ON texts
USING hnsw (vector vector_ip_ops)` makes it fast for many texts."""
import sys

import psycopg
import qemb

model = qemb.Model(sys.argv[1], truncate=True)
texts = [line.strip() for line in open(sys.argv[2], encoding="utf-8", errors="replace")]
db = psycopg.connect()
db.execute(f"CREATE TEMPORARY TABLE texts (text TEXT, vector VECTOR({model.dim}))")
rows = zip((text.replace("\0", " ") for text in texts), map(str, model.embed(texts).tolist()))
db.cursor().executemany("INSERT INTO texts VALUES (%s, %s)", rows)
nearest = "SELECT vector <#> %s AS distance, text FROM texts ORDER BY distance LIMIT 5"
question = model.embed([sys.argv[3]], query=True)[0].tolist()
for distance, text in db.execute(nearest, [str(question)]):
    print(f"{-distance:.4f}\t{text}")
