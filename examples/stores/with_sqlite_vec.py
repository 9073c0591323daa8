#!/usr/bin/env python3
"""Lines of text to nearest neighbours with SQLite: with_sqlite_vec.py MODEL FILE QUESTION

pip install apsw sqlite-vec (apsw, because not every Python's sqlite3 can load extensions). Bytes
that are not UTF-8 become U+FFFD, and a text that is too long is cut: no line is lost. Give
Connection() a file's name to keep the table."""
import sys

import apsw
import qemb
import sqlite_vec

model = qemb.Model(sys.argv[1], truncate=True)
texts = [line.strip() for line in open(sys.argv[2], encoding="utf-8", errors="replace")]
db = apsw.Connection(":memory:")
db.enable_load_extension(True)
sqlite_vec.load(db)
db.execute("CREATE TABLE texts (text TEXT, vector BLOB)")
db.executemany("INSERT INTO texts VALUES (?, ?)", zip(texts, model.embed(texts)))
nearest = "SELECT vec_distance_cosine(vector, ?), text FROM texts ORDER BY 1 LIMIT 5"
for distance, text in db.execute(nearest, model.embed([sys.argv[3]], query=True)):
    print(f"{1 - distance:.4f}\t{text}")
