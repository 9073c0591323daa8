"""Texts to two Arrow columns: vectors, as fixed-size lists of float, and errors. The vector of a
text that cannot be embedded is null, and its error says why. to_parquet.py and to_arrow.py use it.
"""
import hashlib

import pyarrow as pa


def schema_of(model_file, model, schema):
    """schema with the fields `vector` and `error` behind its own. Its metadata also names the model
    by the SHA-256 of its file, so that a reader can tell vectors that must not be compared."""
    vector = pa.field("vector", pa.list_(pa.float32(), model.dim))
    with open(model_file, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    metadata = {**(schema.metadata or {}), "qemb_model_sha256": digest}
    return schema.append(vector).append(pa.field("error", pa.string())).with_metadata(metadata)


def vector_and_error(model, texts):
    """texts: a list of bytes, UTF-8, or None -> the Arrow arrays of the last two fields."""
    errors = {i: "no text" for i, text in enumerate(texts) if text is None}
    # What is not UTF-8 becomes surrogates, which the model refuses.
    strings = [(text or b"").decode("utf-8", "surrogateescape") for text in texts]
    vectors = model.embed(strings, on_error=lambda e: errors.setdefault(e.index, e.message))
    failed = pa.array([i in errors for i in range(len(texts))], pa.bool_())
    vector = pa.FixedSizeListArray.from_arrays(vectors.ravel(), model.dim, mask=failed)
    return [vector, pa.array([errors.get(i) for i in range(len(texts))], pa.string())]
