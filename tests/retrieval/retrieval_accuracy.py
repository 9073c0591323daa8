#!/usr/bin/env python3
"""Retrieval by the vectors of each arithmetic, file and dimension, beside BM25.

Runs ./qemb as a user would, ranks the documents of tests/retrieval by cosine, and prints a table
for each set of queries. Every row is computed by the arithmetic that it names. If this CPU would
serve an arithmetic by another one, build/release/qemb-emulated computes it, with an emulated tile
unit. The emulated GPU is slow, so it gets a sample; f32 stands beside it on the same sample.

Needs numpy; the row INT8 file needs what convert_weights.py needs.
"""
import argparse
import re
import struct
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import ranking
from ranking import Refused, refuse

ROOT = Path(__file__).resolve().parents[2]
DATA, EXAMPLES = ROOT / "tests" / "retrieval", ROOT / "examples"
MATHS = ("f32", "int16", "bf16", "int8")
DIMS = (256, 128, 64, 32)
GPU = {"gpu-f16": ("f16", "GPU, FP16"), "gpu-fp8": ("fp8", "GPU, FP8")}
ROWS = (*MATHS, "int8-file", "dims", *GPU, "bm25")

# by: what computed it. rankings: {corpus: rankings}. sampled: of every N-th document
Row = namedtuple("Row", "name by rankings sampled")
COLUMNS = ("vectors", "by", "top-1", "95 %", "top-5", "MRR", "won", "lost", "other")


# ---- vectors -----------------------------------------------------------------------------------


def embed(program, model, args, texts):
    """Returns the vectors (n, D) and the table that computed them."""
    command = [program, "-m", model, "--output", "f32", "--stats", *args]
    try:
        r = subprocess.run(list(map(str, command)), capture_output=True,
                           input="".join(t + "\n" for t in texts).encode())
    except OSError as e:
        refuse(program, "program", e.strerror, "one that make accuracy builds")
    said = r.stderr.decode(errors="replace").strip()
    if r.returncode:
        raise Refused(said.split("\n")[0] or f"{program}: exit status {r.returncode}")
    v = np.frombuffer(r.stdout, "<f4")
    if not v.size or v.size % len(texts) or not np.isfinite(v).all():
        refuse(program, "vectors", f"{v.size} numbers", f"finite ones for {len(texts)} texts")
    table = re.search(r", table (.+)", said)
    return v.reshape(len(texts), -1), table[1] if table else ""


def embed_corpora(program, model, args, corpora):
    """Returns {corpus: (documents, queries)} and the table. One run for all documents, one for all
    queries, as a user makes an index and asks it."""
    documents, table = embed(program, model, args, [t for c in corpora for t in c.texts])
    queries, _ = embed(program, model, [*args, "--query"],
                       [q.text for c in corpora for q in c.queries])
    vectors, d, q = {}, 0, 0
    for c in corpora:
        vectors[c.name] = documents[d:d + len(c.texts)], queries[q:q + len(c.queries)]
        d, q = d + len(c.texts), q + len(c.queries)
    return vectors, table


def rank(vectors):
    return {name: ranking.by_cosine(q, d) for name, (d, q) in vectors.items()}


def arithmetic(table):
    """avx2-int16 -> int16; the tables of f32 are named after the instructions alone"""
    last = table.rpartition("-")[2]
    return last if last in MATHS else "f32"


def read_vectors(option, corpora):
    """NAME=FILE.npz -> NAME and {corpus: (documents, queries)}"""
    name, _, path = option.partition("=")
    try:
        arrays = np.load(path)
        vectors = {c.name: (arrays[c.name], arrays[f"{c.name}_queries"]) for c in corpora
                   if c.name in arrays}
    except OSError as e:
        refuse("--vectors", "array file", f"{option}: {e.strerror or e}", "NAME=FILE.npz")
    except (ValueError, KeyError, TypeError) as e:
        refuse("--vectors", "arrays", f"{option}: {e}", "those of numpy.savez")
    for c in corpora:
        if c.name in vectors:
            got, want = tuple(map(len, vectors[c.name])), (len(c.texts), len(c.queries))
            if got != want:
                refuse(path, f"{c.name} and their queries", got, want)
    return name, vectors


# ---- an INT8 file of an F16 file ---------------------------------------------------------------


def write_int8_file(source, out):
    """Writes the .qemb file that convert_weights.py --dtype int8 makes of the same checkpoint."""
    sys.path.insert(0, str(ROOT))
    import convert_weights as cw

    data = Path(source).read_bytes()
    n, = struct.unpack_from("<I", data, 32)
    numbers = struct.unpack_from("<9I2f", data, 72)
    c = cw.Config(*numbers[:8], *numbers[9:])
    is_encoder, _, pad_id, first = struct.unpack_from("<4I", data, 148)
    places = cw.Places(pad_id, first, None) if is_encoder else None
    sections, tensors, bits = [], {}, {}
    for i in range(n):
        name, dtype, bits_here, rows, cols, at, size, _ = struct.unpack_from(
            "<48sIIQQQQQ", data, 4096 + 96 * i)
        name = name.rstrip(b"\0").decode()
        if dtype in (cw.U8.code, cw.U32.code):
            kind = cw.U8 if dtype == cw.U8.code else cw.U32
            sections.append(cw.Section(name, kind, rows, cols, data[at:at + size]))
        kind = "F16" if dtype == cw.F16.code else "F32"
        tensors[name], bits[name] = cw.Tensor(name, Path(source), kind, (rows, cols), at), bits_here
    for s in cw.weight_sections(c, places, cw.MATRIX_DTYPES["int8"]):
        parts = [(s.name, s.rows)] if s.data else ()  # () for scales
        sections.append(s._replace(data=parts, bits=bits[s.name] if s.dtype is cw.F16 else 0,
                                   plus=None))
    with open(out, "wb") as f:
        fields = data[72:140], data[148:164]
        cw.write_sections(f, fields, sections, tensors, cw.tqdm(disable=True))


def has_int8_weights(model):
    data = Path(model).read_bytes()
    n, = struct.unpack_from("<I", data, 32)
    return any(struct.unpack_from("<I", data, 4096 + 96 * i + 48)[0] == 4 for i in range(n))


# ---- rows --------------------------------------------------------------------------------------


def math_rows(a, corpora, note):
    """Yields a row for each arithmetic, by a table of this CPU or by the emulated tile unit."""
    for math in [m for m in MATHS if m in a.rows]:
        program, by = a.qemb, embed(a.qemb, a.model, ["--math", math], ["x"])[1]
        if arithmetic(by) != math:
            note(f"This CPU serves --math {math} by {by}; the row is of the arithmetic itself.")
            program = a.emulated
        vectors, by = embed_corpora(program, a.model, ["--math", math], corpora)
        yield Row(math, by, rank(vectors), False), vectors


def file_row(a, corpora, note):
    if has_int8_weights(a.model):
        note(f"{a.model} has INT8 weights: so has every row.")
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "int8.qemb"
        write_int8_file(a.model, model)
        vectors, by = embed_corpora(a.qemb, model, ["--math", "f32"], corpora)
    yield Row("INT8 file, f32", by, rank(vectors), False)


def dim_rows(a, corpora, whole):
    for dim in [d for d in DIMS if d < whole]:
        vectors, by = embed_corpora(a.qemb, a.model, ["--dim", dim], corpora)
        yield Row(f"f32, {dim} of {whole} numbers", by, rank(vectors), False)


def gpu_rows(a, corpora, f32, note):
    """The rows of the emulated GPU, behind f32's on the same sample."""
    if not Path(a.gpu).exists():
        note(f"The emulated GPU is left out: no {a.gpu}, which needs the headers of CUDA.")
        return
    sampled, kept = [], {}
    for c in corpora:
        small, where = ranking.sample(c, a.gpu_sample)
        if small.queries:
            sampled.append(small)
            kept[c.name] = tuple(v[i] for v, i in zip(f32[c.name],
                                                      (slice(None, None, a.gpu_sample), where)))
    if not sampled:
        note(f"The emulated GPU is left out: no query for one document in {a.gpu_sample}.")
        return
    yield Row("f32", "the same vectors", rank(kept), True)
    for name in [g for g in GPU if g in a.rows]:
        math, title = GPU[name]
        vectors, _ = embed_corpora(a.gpu, a.model, ["--math", math], sampled)
        yield Row(title, "emulated", rank(vectors), True)


def all_rows(a, corpora, note, progress):
    """Yields the rows. The first is f32, with which the others are compared."""
    f32 = None
    for row, vectors in math_rows(a, corpora, note):
        f32 = f32 or vectors
        progress(row)
        yield row
    others = [(True, [Row(name, "", rank(vectors), False)]) for name, vectors in
              (read_vectors(option, corpora) for option in a.vectors)]
    width = next(iter(f32.values()))[0].shape[1]
    for wanted, rows in (("int8-file" in a.rows, file_row(a, corpora, note)),
                         ("dims" in a.rows, dim_rows(a, corpora, width)),
                         ("bm25" in a.rows, bm25_row(corpora)), *others,
                         (set(GPU) & set(a.rows), gpu_rows(a, corpora, f32, note))):
        for row in rows if wanted else ():
            progress(row)
            yield row


def bm25_row(corpora):
    yield Row("BM25", "SQLite FTS5", {c.name: ranking.by_bm25([q.text for q in c.queries], c.texts)
                                      for c in corpora}, False)


# ---- tables ------------------------------------------------------------------------------------


def cells(row, judged, reference):
    n = len(judged.ranks)
    share = ranking.top(judged.ranks, 1)
    low, high = ranking.wilson(share, n)
    won, lost, other = ranking.compare(judged, reference)
    beside = ("", "", "") if judged is reference else (str(won), str(lost), str(other))
    return (row.name, row.by, f"{100 * share:.1f}", f"{100 * low:.1f} - {100 * high:.1f}",
            f"{100 * ranking.top(judged.ranks, 5):.1f}", f"{ranking.mrr(judged.ranks):.3f}",
            *beside)


def tables(rows, corpora, step):
    """Yields (title, lines of cells) for each set of queries, and for its sample behind it; then
    for all sets together, and for their samples."""
    parts = [[] for _ in rows]  # the judgements of a row, set by set
    for whole in corpora:
        for name in dict.fromkeys(q.set for q in whole.queries):
            for sampled in (False, True):
                corpus = ranking.sample(whole, step)[0] if sampled else whole
                mine = [i for i, q in enumerate(corpus.queries) if q.set == name]
                chosen = [k for k, r in enumerate(rows)
                          if r.sampled == sampled and corpus.name in r.rankings]
                if not mine or not chosen:
                    continue
                accepted = [corpus.queries[i].accepted for i in mine]
                for k in chosen:
                    found = [rows[k].rankings[corpus.name][i] for i in mine]
                    parts[k].append(ranking.judge(found, accepted))
                among = f"{len(mine)} queries, {len(corpus.texts)} documents"
                yield titled(f"{name}: {among}", sampled and step,
                             [(rows[k], parts[k][-1]) for k in chosen])
    for sampled in (False, True):
        of_kind = [(r, p) for r, p in zip(rows, parts) if r.sampled == sampled]
        most = max((len(p) for _, p in of_kind), default=0)  # the first row has all sets
        if most > 1:
            joined = [(r, ranking.join(p)) for r, p in of_kind if len(p) == most]
            yield titled(f"all: {len(joined[0][1].ranks)} queries", sampled and step, joined)


def titled(title, step, judged):
    """judged: rows and their judgements, the reference first. step: of the sample, or False"""
    return (title + (f" (one in {step})" if step else ""),
            [cells(r, j, judged[0][1]) for r, j in judged])


def show(title, lines, markdown):
    if markdown:
        print(f"\n**{title}**\n")
        for line in (COLUMNS, ("---",) * len(COLUMNS), *lines):
            print("| " + " | ".join(line) + " |")
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines)]
    print(f"\n{title}")
    for line in (COLUMNS, *lines):
        print("  ".join(f"{cell:{'<' if i < 2 else '>'}{w}}" for i, (cell, w)
                        in enumerate(zip(line, widths))).rstrip())


LEGEND = ("top-1, top-5: % of queries with an accepted document among the first 1 or 5. 95 %: "
          "interval of top-1 (Wilson). MRR: mean of 1 / rank of the first accepted document. "
          "Compared with the table's first row: queries won and lost (right at top-1 here alone, "
          "there alone), and with another document first.")


def read_corpora(a):
    corpora = [ranking.read_queries(a.queries, ranking.read_documents(a.documents))]
    if a.needs:
        corpus = ranking.read_documents(a.packages)
        for path in a.needs:
            corpus = ranking.read_needs(path, corpus)
        corpora.append(corpus)
    if a.sets:
        known = {q.set for c in corpora for q in c.queries}
        for name in set(a.sets) - known:
            refuse("--sets", "set", name, ", ".join(sorted(known)))
        corpora = [c._replace(queries=[q for q in c.queries if q.set in a.sets]) for c in corpora]
    corpora = [c for c in corpora if c.queries]
    if not corpora:
        refuse(a.queries, "queries", "none", "at least one")
    return corpora


def options(args):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default=EXAMPLES / "demo.qemb")
    p.add_argument("--documents", default=DATA / "documents.tsv")
    p.add_argument("--queries", default=DATA / "queries.tsv")
    p.add_argument("--packages", default=EXAMPLES / "packages.txt",
                   help="the documents of --needs")
    p.add_argument("--needs", nargs="*", default=sorted(DATA.glob("needs*.tsv")))
    p.add_argument("--sets", nargs="+", help="sets of queries (default: all)")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS),
                   help="f32 comes with every choice")
    p.add_argument("--vectors", action="append", default=[], metavar="NAME=FILE.npz",
                   help="a row of other vectors: arrays `documents` and `documents_queries` (and "
                   "`packages`, `packages_queries`), in the order of the files")
    p.add_argument("--gpu-sample", type=int, default=4, metavar="N",
                   help="the emulated GPU gets one document in N (default %(default)s)")
    p.add_argument("--qemb", default=ROOT / "qemb")
    p.add_argument("--emulated", default=ROOT / "build/release/qemb-emulated")
    p.add_argument("--gpu", default=ROOT / "build/emu/qemb-cuda")
    p.add_argument("--markdown", action="store_true", help="tables for docs/accuracy.md")
    a = p.parse_args(args)
    if a.gpu_sample < 1:
        p.error("--gpu-sample: at least 1")
    a.rows = ["f32", *a.rows]
    return a


def main(args):
    a, notes = options(args), []
    try:
        corpora = read_corpora(a)
        rows = list(all_rows(a, corpora, notes.append,
                             lambda row: print(f"{row.name}: done", file=sys.stderr)))
    except Refused as e:
        sys.exit(f"retrieval_accuracy.py: {' '.join(str(e).split())}")
    for title, lines in tables(rows, corpora, a.gpu_sample):
        show(title, lines, a.markdown)
    print("\n" + "\n".join([*notes, LEGEND]))


if __name__ == "__main__":
    main(sys.argv[1:])
