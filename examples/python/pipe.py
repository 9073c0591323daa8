#!/usr/bin/env python3
"""The same without a package: a process that is kept open. pipe.py MODEL QUERY DOCUMENT...

JSON in both directions: a text may have newlines, and the id says which text an answer is for, even
after an exception between question and answer. $QEMB names the program."""
import json
import os
import sys
from subprocess import PIPE, Popen


class Embedder:
    def __init__(self, model, *options):
        self.qemb = Popen([os.environ.get("QEMB", "qemb"), "-m", model, "--input", "jsonl",
                           "--output", "jsonl", *options], stdin=PIPE, stdout=PIPE)
        self.asked = 0

    def embed(self, text):
        """-> a vector of length 1, as a list"""
        self.asked += 1
        record = json.dumps({"id": self.asked, "text": text}, ensure_ascii=False)
        self.qemb.stdin.write(record.encode() + b"\n")  # a lone surrogate fails here: ValueError
        self.qemb.stdin.flush()
        for line in self.qemb.stdout:
            answer = json.loads(line)
            if answer.get("id") == self.asked:
                if "error" in answer:
                    raise ValueError(answer["error"])
                return answer["embedding"]
        raise RuntimeError(f"qemb ended with status {self.qemb.wait()}")


def main():
    model, query, *documents = sys.argv[1:]
    asked, index = Embedder(model, "--query"), Embedder(model, "--document")
    q = asked.embed(query)
    for document in documents:
        print(f"{sum(a * b for a, b in zip(q, index.embed(document))):.4f}  {document}")


if __name__ == "__main__":
    main()
