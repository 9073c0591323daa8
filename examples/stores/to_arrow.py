#!/usr/bin/env python3
"""Lines of text to an Arrow IPC stream with their vectors: to_arrow.py MODEL < LINES > STREAM

Columns: `line`, from 1, `text`, `vector`, a fixed-size list of float, and `error`, which is null if
there is a vector. Holds ROWS lines at a time. Ends with a mark: a stream without one was cut."""
import sys
from itertools import islice

import pyarrow as pa
import qemb
from vector_column import schema_of, vector_and_error

ROWS = 4096


def main(model_file):
    model = qemb.Model(model_file)
    own = pa.schema([("line", pa.int64()), ("text", pa.string())])
    schema = schema_of(model_file, model, own)
    first = 1
    with pa.ipc.new_stream(sys.stdout.buffer, schema) as stream:
        while lines := [line.rstrip(b"\r\n") for line in islice(sys.stdin.buffer, ROWS)]:
            numbers = pa.array(range(first, first + len(lines)), pa.int64())
            texts = pa.array([line.decode("utf-8", "replace") for line in lines], pa.string())
            arrays = [numbers, texts, *vector_and_error(model, lines)]
            stream.write(pa.record_batch(arrays, schema))
            first += len(lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
