"""ranking.py - reads the retrieval data, ranks documents for queries, judges the rankings.

    documents.tsv   id <tab> text
    packages.txt    id - text
    queries.tsv     set <tab> accepted ids, with spaces between <tab> query
    needs*.tsv      query <tab> accepted ids; the set is named after the file

A ranking lists indexes of documents, the best first. A document that it does not list is not found.
"""
import math
import re
import sqlite3
from collections import namedtuple
from pathlib import Path

import numpy as np

# accepted: indexes of documents
Query = namedtuple("Query", "set accepted text")
# name: of the documents' file without ending. ids, texts: of the documents
Corpus = namedtuple("Corpus", "name ids texts queries")
# Of each query, (n) arrays. ranks: of the first accepted document, from 1; 0: not found. firsts:
# the index of the first document, -1 if none was found
Judged = namedtuple("Judged", "ranks firsts")


class Refused(Exception):
    """An error for the user, in one line."""


def refuse(obj, what, got, want):
    raise Refused(f"{obj}: {what} (got {got}, want {want})")


# ---- files -------------------------------------------------------------------------------------


def read_lines(path, separator, *columns):
    """Yields (place, fields) of each line. A text may hold any character but newline and
    separator, so splitlines() would cut too often. The last column takes what is left."""
    try:
        lines = Path(path).read_bytes().decode().split("\n")
    except OSError as e:
        refuse(path, "file", e.strerror, "a readable one")
    except UnicodeDecodeError as e:
        refuse(path, "text", f"no UTF-8 at byte {e.start}", "UTF-8")
    if lines[-1] == "":
        lines.pop()
    for n, line in enumerate(lines, 1):
        fields = line.split(separator, len(columns) - 1)
        if len(fields) != len(columns) or not all(fields) or "\t" in fields[-1]:
            refuse(f"{path}:{n}", "line", repr(line[:60]), separator.join(columns))
        yield f"{path}:{n}", fields


def read_documents(path):
    """Returns the documents of a .tsv or a .txt file as a Corpus without queries."""
    ids, texts = {}, []
    for place, (name, text) in read_lines(path, "\t" if Path(path).suffix == ".tsv" else " - ",
                                          "id", "text"):
        if name in ids:
            refuse(place, "id", f"{name} again", "one of its own")
        ids[name] = len(texts)
        # The user's line of packages.txt is the document, name included.
        texts.append(text if Path(path).suffix == ".tsv" else f"{name} - {text}")
    if not texts:
        refuse(path, "documents", "none", "at least one")
    return Corpus(Path(path).stem, ids, texts, [])


def find(place, names, ids):
    for name in names.split():
        if name not in ids:
            refuse(place, "accepted id", name, "one of a document")
    return frozenset(ids[name] for name in names.split())


def read_queries(path, corpus):
    """Returns the corpus with the queries of a queries.tsv."""
    return corpus._replace(queries=corpus.queries + [
        Query(name, find(place, accepted, corpus.ids), text)
        for place, (name, accepted, text) in read_lines(path, "\t", "set", "ids", "query")])


def read_needs(path, corpus):
    """Returns the corpus with the queries of a needs.tsv."""
    return corpus._replace(queries=corpus.queries + [
        Query(Path(path).stem, find(place, accepted, corpus.ids), text)
        for place, (text, accepted) in read_lines(path, "\t", "query", "ids")])


def sample(corpus, step):
    """Returns every step-th document with the queries that one of these answers, and the indexes
    of these queries."""
    kept = [frozenset(i // step for i in q.accepted if i % step == 0) for q in corpus.queries]
    where = [i for i, accepted in enumerate(kept) if accepted]
    ids = {name: i for i, name in enumerate(list(corpus.ids)[::step])}
    queries = [corpus.queries[i]._replace(accepted=kept[i]) for i in where]
    return Corpus(corpus.name, ids, corpus.texts[::step], queries), where


# ---- rankings ----------------------------------------------------------------------------------


def by_cosine(queries, documents):
    """queries (n, D), documents (m, D) -> (n, m) indexes of documents. Equal scores: in the order
    of the documents."""
    q, d = (v / np.linalg.norm(v, axis=1, keepdims=True)
            for v in (np.asarray(queries, "f8"), np.asarray(documents, "f8")))
    # A BLAS may add up the columns of a product in different orders. Equal documents must tie.
    distinct, index = np.unique(d, axis=0, return_inverse=True)
    scores = (q @ distinct.T)[:, index.ravel()]
    return np.argsort(-scores, axis=1, kind="stable")


def by_bm25(queries, documents):
    """Texts -> a list of indexes for each query, by SQLite's FTS5 with its k1 = 1.2, b = 0.75. A
    document is found if it has one of the query's words."""
    with sqlite3.connect(":memory:") as db:
        db.execute("CREATE VIRTUAL TABLE d USING fts5(text, tokenize='porter unicode61')")
        db.executemany("INSERT INTO d(rowid, text) VALUES (?, ?)", enumerate(documents))
        search = "SELECT rowid FROM d WHERE d MATCH ? ORDER BY bm25(d), rowid"
        rankings = []
        for text in queries:
            words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", text))
            rankings.append([i for i, in db.execute(search, [words])] if words else [])
        return rankings


# ---- figures -----------------------------------------------------------------------------------


def judge(rankings, accepted):
    """accepted: a set of indexes for each ranking"""
    ranks = [next((rank for rank, i in enumerate(ranking, 1) if i in want), 0)
             for ranking, want in zip(rankings, accepted, strict=True)]
    firsts = [ranking[0] if len(ranking) else -1 for ranking in rankings]
    return Judged(np.array(ranks, int), np.array(firsts, int))


def join(parts):
    """Judgements of several sets of queries, as one."""
    return Judged(*map(np.concatenate, zip(*parts)))


def top(ranks, k):
    """The share of queries with an accepted document among the first k."""
    return float(((ranks > 0) & (ranks <= k)).mean())


def mrr(ranks):
    """The mean of 1 / rank; a query without an answer counts 0."""
    return float(np.divide(1, ranks, where=ranks > 0, out=np.zeros(len(ranks))).mean())


def wilson(share, n):
    """The 95 % confidence interval of a share of n (Wilson 1927)."""
    z = 1.959964  # of the normal distribution's 97.5 %
    middle, below = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)


def compare(judged, reference):
    """Top-1 answers, beside those of a reference: right here alone, right there alone, other
    documents (right or wrong)."""
    here, there = judged.ranks == 1, reference.ranks == 1
    return (int((here & ~there).sum()), int((there & ~here).sum()),
            int((judged.firsts != reference.firsts).sum()))
