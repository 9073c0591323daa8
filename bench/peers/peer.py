"""What the Python peers share: their arguments, the texts, and when they are computed.

    PEER MODEL THREADS FILE [--batch-tokens N] [--turns] [its own options]

MODEL is a Hugging Face directory, FILE has a text a line. Each text is computed with the
end-of-text token that the tokenizer appends. A batch has up to N tokens (1024, as in qemb); texts
are sorted by length, so that a batch has next to no padding. Padding stands at the end: attention
is causal, so no token of a text sees it, no mask is needed, and the vector is the row of the text's
last token, scaled to length 1.

Without --turns all texts are computed once. With --turns the program computes them once for every
line on its standard input, and prints the line "done" after it (`qemb-bench turns`)."""

import argparse
import sys
from pathlib import Path


def arguments(doc):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("threads", type=int)
    p.add_argument("file", type=Path)
    p.add_argument("--batch-tokens", type=int, default=1024)
    p.add_argument("--turns", action="store_true")
    return p


def batches_of(options):
    """[(ids, lengths)]: ids (texts, longest) with zeros behind each text's own, as numpy arrays."""
    import numpy
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    lines = options.file.read_text().splitlines()
    texts = sorted((e.ids for e in tokenizer.encode_batch(lines)), key=len)
    batches = [[]]
    for ids in texts:
        if batches[-1] and (len(batches[-1]) + 1) * len(ids) > options.batch_tokens:
            batches.append([])
        batches[-1].append(ids)
    made = []
    for batch in batches:
        padded = numpy.zeros((len(batch), len(batch[-1])), dtype=numpy.int64)
        for row, ids in zip(padded, batch):
            row[: len(ids)] = ids
        made.append((padded, numpy.array([len(ids) for ids in batch])))
    return made


def run(options, embed):
    """embed(ids, lengths) returns the vectors of a batch."""
    batches = batches_of(options)
    if not options.turns:
        return [embed(*b) for b in batches]
    for _ in sys.stdin:
        for b in batches:
            embed(*b)
        print("done", flush=True)
    return None
