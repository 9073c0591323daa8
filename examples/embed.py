#!/usr/bin/env python3
"""The cosines between a query and documents: examples/embed.py MODEL QUERY DOCUMENT...

Keeps ./qemb, or $QEMB, as a process: a line of text in, a JSON array out, at once."""
import json
import os
import sys
from subprocess import PIPE, Popen


class Embedder:
    def __init__(self, model, *options):
        self.qemb = Popen([os.environ.get("QEMB", "./qemb"), "-m", model, *options], stdin=PIPE,
                          stdout=PIPE, encoding="utf-8", bufsize=1)

    def embed(self, line):
        """-> a vector of length 1, as a list. The line must have no newline."""
        self.qemb.stdin.write(line + "\n")
        answer = json.loads(self.qemb.stdout.readline())
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer


def main():
    model, query, *documents = sys.argv[1:]
    asked, index = Embedder(model, "--query"), Embedder(model)
    q = asked.embed(query)
    for document in documents:
        print(f"{sum(a * b for a, b in zip(q, index.embed(document))):.4f}  {document}")


if __name__ == "__main__":
    main()
