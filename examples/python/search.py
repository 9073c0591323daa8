#!/usr/bin/env python3
"""The cosines between a query and documents: search.py MODEL QUERY DOCUMENT..."""
import sys

import qemb


def main():
    path, query, *documents = sys.argv[1:]
    with qemb.Model(path) as model:
        prompt = "document" if "document" in model.prompts else None
        cosines = model.embed(documents, prompt=prompt) @ model.embed([query], query=True)[0]
    for cosine, document in zip(cosines, documents):
        print(f"{cosine:.4f}  {document}")


if __name__ == "__main__":
    main()
