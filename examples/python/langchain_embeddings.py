"""LangChain's embeddings by a qemb model:

    store = InMemoryVectorStore(QembEmbeddings("model.qemb"))
"""
from langchain_core.embeddings import Embeddings

import qemb


class QembEmbeddings(Embeddings):
    """options: those of qemb.Model. Documents get the model's prompt for them, if it has one;
    queries get its prompt for queries, or that of the task `instruct`."""

    def __init__(self, path, instruct=None, dim=None, **options):
        self.model = qemb.Model(path, **options)
        self.dim = dim
        self.document = "document" if "document" in self.model.prompts else None
        has_query = "query" in self.model.prompts
        self.query = {"instruct": instruct} if instruct else {"query": has_query}

    def embed_documents(self, texts):
        return self.model.embed(texts, prompt=self.document, dim=self.dim).tolist()

    def embed_query(self, text):
        return self.model.embed([text], dim=self.dim, **self.query)[0].tolist()
