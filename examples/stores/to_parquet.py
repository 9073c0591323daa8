#!/usr/bin/env python3
"""A Parquet file with a column of texts to one that has their vectors beside them.

    to_parquet.py MODEL IN.parquet OUT.parquet [COLUMN]        COLUMN: text

Adds `vector`, a fixed-size list of float, and `error`, which is null if there is a vector. Holds
ROWS rows at a time. OUT appears when it is complete; until then OUT.part grows, which another run
replaces."""
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import qemb
from vector_column import schema_of, vector_and_error

ROWS = 4096  # of 1,024 numbers: 16 MB of vectors


def main(model_file, source, target, column="text"):
    table = pq.ParquetFile(source)
    names = table.schema_arrow.names
    if column not in names or {"vector", "error"} & set(names):
        sys.exit(f"{source}: bad columns (got {names}, want {column!r}, no 'vector', no 'error')")
    model = qemb.Model(model_file)
    schema = schema_of(model_file, model, table.schema_arrow)
    with open(target + ".part", "wb") as part:
        with pq.ParquetWriter(part, schema) as writer:
            for rows in table.iter_batches(ROWS):
                texts = rows.column(column).cast(pa.binary()).to_pylist()
                arrays = [*rows.columns, *vector_and_error(model, texts)]
                writer.write_batch(pa.record_batch(arrays, schema))
        part.flush()
        os.fsync(part.fileno())
    os.replace(target + ".part", target)


if __name__ == "__main__":
    main(*sys.argv[1:])
