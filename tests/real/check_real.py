#!/usr/bin/env python3
"""Trained weights: what qemb finds with multilingual-e5-small, beside transformers with the same.

    check_real.py MODEL FILE.qemb      (`make check-real`; MODEL: the directory of make_e5_small.py)

The file is converted from MODEL here. Then:
- the scores of six queries for six passages, in six languages, beside those that were computed by
  transformers for docs/accuracy.md before qemb ran this model
- retrieval over the descriptions of 300 Debian packages in English, asked in English, German,
  French and Japanese, and over 300 synopses in German, asked in French and Japanese (the data of
  tests/retrieval)

transformers computes in double, one text at a time, with the matrices rounded to FP16 as in the
.qemb. Every number of every vector has to agree to NUMBER. Each query has to find the same first
document, unless the two documents' scores are so close that rounding decides: such ties are named.
Exits with 1 if something does not hold.
"""
import subprocess
import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/retrieval"))
import ranking  # noqa: E402
from retrieval_accuracy import arithmetic, embed  # noqa: E402

# Largest difference of a number of a unit vector, of arithmetic in float32 against double. A text's
# vector passes some 300 roundings of 2^-24 a layer's row (sums of 384 or 1,536 products in blocks),
# 12 layers, numbers of 0.05 (1 / sqrt(384)): of the order of 1e-7, as transformers' own float32
# has; 2e-6 leaves room for an unlucky order of sums, and is a hundredth of what int16 errs by.
NUMBER = 2e-6
DOCUMENTS = 300
PROMPTS = {"query": "query: ", "document": "passage: "}
MATHS = "f32", "int16", "bf16", "int8"

QUERIES = ("What is the capital of China?", "Explain gravity",
           "how much protein should a female eat", "Was ist der höchste Berg der Welt?",
           "富士山の高さは", "cómo hacer pan en casa")
PASSAGES = ("The capital of China is Beijing.",
            "Gravity is a force that attracts two bodies towards each other.",
            "Women need about 46 grams of protein a day.",
            "Mount Everest is the highest mountain on Earth, 8,849 metres above sea level.",
            "富士山は標高3776メートルで日本一高い山である。",
            "Para hacer pan, mezcla harina, agua, sal y levadura, amasa y hornea.")
# transformers in float32, the weights as in MODEL. Rows: queries. The diagonal is the answer.
SCORES = np.array([[0.8944, 0.7251, 0.7121, 0.7435, 0.7012, 0.7201],
                   [0.7299, 0.8752, 0.7901, 0.8111, 0.7392, 0.7751],
                   [0.7129, 0.7937, 0.9052, 0.7729, 0.7063, 0.7901],
                   [0.7072, 0.7455, 0.6959, 0.8433, 0.7708, 0.7184],
                   [0.7140, 0.7582, 0.7245, 0.8069, 0.9354, 0.7140],
                   [0.7044, 0.7395, 0.7781, 0.7156, 0.6795, 0.9214]])

failed = []


def hold(true, what):
    print(f"{'ok' if true else 'FAILED'}: {what}")
    if not true:
        failed.append(what)


# ---- transformers ------------------------------------------------------------------------------


class Reference:
    """The model in double. rounded: with matrices as in a .qemb, else as in the directory."""

    def __init__(self, folder, rounded):
        self.tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.model = transformers.BertModel.from_pretrained(
            folder, add_pooling_layer=False, dtype=torch.float32,
            attn_implementation="eager").eval()
        for name, p in self.model.named_parameters():
            tables = "position_embeddings" in name or "token_type_embeddings" in name
            if rounded and p.dim() == 2 and not tables:
                p.data = p.data.half().float()
        self.model.double()

    def embed(self, prompt, texts):
        """(n, D) unit vectors: the mean of all rows."""
        rows = []
        with torch.no_grad():
            for text in texts:
                ids = torch.tensor([self.tokenizer.encode(PROMPTS[prompt] + text).ids])
                rows.append(self.model(input_ids=ids).last_hidden_state[0].mean(dim=0).numpy())
        v = np.array(rows)
        assert v.dtype == np.float64
        return v / np.linalg.norm(v, axis=1, keepdims=True)


# ---- checks ------------------------------------------------------------------------------------


def check_scores(model, rounded, folder):
    """The table of six queries and six passages."""
    def scores(f):
        return f("query", QUERIES) @ f("document", PASSAGES).T

    qemb = scores(lambda prompt, texts: unit(embed_by_qemb(model, prompt, texts, "f32")[0]))
    plain, halves = scores(Reference(folder, rounded=False).embed), scores(rounded.embed)
    print("\n| query | " + " | ".join("Beijing gravity protein Everest Fuji pan".split()) + " |\n"
          + "|---" * 7 + "|")
    for text, row in zip(QUERIES, qemb):
        print(f"| {text} | " + " | ".join(f"{s:.4f}" for s in row) + " |")
    off = np.abs(plain - SCORES).max()
    # Half of the last printed digit, and float32's part: two vectors, each off by 2e-7 in a number.
    hold(off <= 5e-5 + 2 * 384**0.5 * 2e-7,
         f"transformers in double has the scores of docs/accuracy.md (difference {off:.1e})")
    off, cost = np.abs(qemb - SCORES).max(), np.abs(halves - plain).max()
    # A score's error is at most the sum of both vectors' errors (Cauchy and Schwarz).
    hold(off <= 5e-5 + 2 * 384**0.5 * NUMBER + cost,
         f"so has qemb (largest difference {off:.1e}, of which FP16 weights cost {cost:.1e})")
    hold((qemb.argmax(axis=1) == np.arange(6)).all(), "each query finds its passage")


def unit(v):
    v = v.astype("f8")
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def embed_by_qemb(model, prompt, texts, math):
    """Vectors and the table that computed them."""
    return embed(ROOT / "qemb", model, [f"--{prompt}", "--math", math], texts)


def corpora():
    """Descriptions in English; synopses in German, asked in other languages."""
    everything = ranking.read_documents(ROOT / "tests/retrieval/documents.tsv")
    everything = ranking.read_queries(ROOT / "tests/retrieval/queries.tsv", everything)
    yield ranking.sample(everything, len(everything.ids) // DOCUMENTS)[0]
    german = [q for q in everything.queries if q.set == "german"]
    where = {q.accepted: i for i, q in enumerate(german)}
    yield ranking.Corpus("german synopses", range(len(german)), [q.text for q in german], [
        ranking.Query(f"{q.set}, in German", frozenset([where[q.accepted]]), q.text)
        for q in everything.queries if q.set in ("french", "japanese") and q.accepted in where])


def name_ties(corpus, q, d, q2, d2):
    """qemb's first documents, q and d, beside the reference's, q2 and d2. Returns how many differ,
    and whether all of these are ties."""
    mine, other = (np.array(ranking.by_cosine(*v))[:, 0] for v in ((q, d), (q2, d2)))
    near = 2 * (np.linalg.norm(q - q2, axis=1) + np.linalg.norm(d - d2, axis=1).max())
    explained = True
    for i in np.flatnonzero(mine != other):
        gap = q2[i] @ d2[other[i]] - q2[i] @ d2[mine[i]]
        explained &= gap <= near[i]
        print(f"  other first document: {corpus.queries[i].text!r}: "
              f"{corpus.texts[mine[i]][:40]!r}, transformers {corpus.texts[other[i]][:40]!r}, "
              f"scores differ by {gap:.1e}")
    return int((mine != other).sum()), explained


def check_retrieval(model, reference):
    worst, longest = 0.0, 0
    table = ["| queries | n | top-1, % | top-5, % | transformers' top-1 | BM25's top-1 | "
             + " | ".join(f"{m}: top-1, other first" for m in MATHS[1:]) + " |", "|---" * 9 + "|"]
    for corpus in corpora():
        texts = [q.text for q in corpus.queries]
        q2, d2 = reference.embed("query", texts), reference.embed("document", corpus.texts)
        longest = max([longest] + [len(reference.tokenizer.encode(t).ids) for t in corpus.texts])
        rows = {}
        for math in MATHS:
            d, by = embed_by_qemb(model, "document", corpus.texts, math)
            q, by = embed_by_qemb(model, "query", texts, math)
            if arithmetic(by) == math:
                rows[math] = unit(q), unit(d)
        q, d = rows["f32"]
        worst = np.max([worst, np.abs(q - q2).max(), np.abs(d - d2).max()])  # NaN stays
        others, explained = name_ties(corpus, q, d, q2, d2)
        hold(explained, f"{corpus.name}: {len(corpus.texts)} documents, {len(texts)} queries; "
             f"transformers finds another first document for {others}")
        accepted = [x.accepted for x in corpus.queries]
        judged = {k: ranking.judge(ranking.by_cosine(*v), accepted)
                  for k, v in (rows | {"transformers": (q2, d2)}).items()}
        judged["bm25"] = ranking.judge(ranking.by_bm25(texts, corpus.texts), accepted)
        for name in dict.fromkeys(x.set for x in corpus.queries):
            here = np.array([x.set == name for x in corpus.queries])
            of = {k: ranking.Judged(*(a[here] for a in v)) for k, v in judged.items()}
            top = {k: 100 * ranking.top(v.ranks, 1) for k, v in of.items()}
            cells = [name, str(here.sum()), f"{top['f32']:.1f}",
                     f"{100 * ranking.top(of['f32'].ranks, 5):.1f}", f"{top['transformers']:.1f}",
                     f"{top['bm25']:.1f}"]
            cells += [f"{top[m]:.1f}, {ranking.compare(of[m], of['f32'])[2]}" if m in of else "-"
                      for m in MATHS[1:]]
            table.append("| " + " | ".join(cells) + " |")
            if name in ("german", "french", "japanese") or "," in name:
                hold(top["f32"] > top["bm25"], f"{name}: finds more than shared words do")
    hold(worst <= NUMBER, f"largest difference of a number of a unit vector: {worst:.1e} (want at "
         f"most {NUMBER:g}); texts of up to {longest} tokens")
    print("\n" + "\n".join(table))


def main(folder, model):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, tokenizers "
          f"{tokenizers.__version__}")
    prompts = [x for name, text in PROMPTS.items() for x in ("--prompt", f"{name}={text}")]
    subprocess.run([sys.executable, ROOT / "convert_weights.py", folder, "--out", model, "--quiet",
                    *prompts], check=True)
    rounded = Reference(folder, rounded=True)
    check_scores(model, rounded, folder)
    check_retrieval(model, rounded)
    print(f"{len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
