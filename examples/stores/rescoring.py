#!/usr/bin/env python3
"""What small vectors find: rescoring.py MODEL TEXTS QUESTIONS

Keeps each text's vector as a bit and as a byte a number, as `qemb --output binary` and `int8` make
them. The bits find 40 texts by their Hamming distance from the question's bits; the bytes put these
in order, by cosine with the question's floats. Prints the bytes of a vector and recall@10: the
share of the ten nearest texts, by exact search in floats, that are among the first ten. Of a line
in QUESTIONS, what follows a tab is not read."""
import sys

import numpy as np
import qemb

K, CANDIDATES = 10, 40


def best(scores, k):
    """The indices of the k highest scores, best first; of equal scores the first."""
    return np.argsort(-scores, kind="stable")[:k]


def to_binary(vectors):
    return np.packbits(vectors > 0, axis=-1)


def to_int8(vectors):
    """The largest magnitude becomes 127: a vector's scale is its own, and is lost. In double
    precision, as the program does it."""
    exact = 127 * vectors.astype(float)
    return np.rint(exact / np.abs(vectors).max(axis=-1, keepdims=True)).astype(np.int8)


def cosines(int8, question):
    """Up to the question's length, which changes no order."""
    return int8 @ question / np.linalg.norm(int8.astype(float), axis=-1)


def searches(floats, int8, binary, question):
    """{name: the ten nearest texts}"""
    distances = np.unpackbits(binary ^ to_binary(question), axis=-1).sum(axis=-1, dtype=int)
    near = best(-distances, CANDIDATES)
    return {"float32": best(floats @ question, K), "int8": best(cosines(int8, question), K),
            "binary": near[:K], "binary, then int8": near[best(cosines(int8[near], question), K)]}


def main(model_file, text_file, question_file):
    model = qemb.Model(model_file, truncate=True)
    texts, questions = ([line.split("\t")[0].strip() for line in
                         open(name, encoding="utf-8", errors="replace")]
                        for name in (text_file, question_file))
    floats, asked = model.embed(texts), model.embed(questions, query=True).astype(float)
    int8, binary = to_int8(floats), to_binary(floats)
    results = [searches(floats, int8, binary, question) for question in asked]
    a, b, c = (array.nbytes // len(texts) for array in (floats, int8, binary))
    for name, size in zip(results[0], (a, b, c, b + c)):
        hits = sum(len({*result[name]} & {*result["float32"]}) for result in results)
        print(f"{name:18} {size:5} bytes  recall@{K} {hits / K / len(results):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
