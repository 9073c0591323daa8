#!/bin/sh
# The nearest lines of FILE with DuckDB, which reads what the pipe writes.
#   duckdb.sh MODEL FILE QUESTION          prints score and line number; best first
# pip install duckdb-cli has the program duckdb. The record of a line that cannot be embedded has an
# error and no vector. QEMB names the program qemb.
qemb=${QEMB:-./qemb}
question=$(printf '%s\n' "$3" | "$qemb" -m "$1" --query) || exit 1
"$qemb" -m "$1" --output jsonl <"$2" | duckdb -noheader -list -separator '	' -c "
  SELECT list_inner_product(embedding, $question::FLOAT[]) AS score, id
  FROM read_json('/dev/stdin', columns={id: 'BIGINT', embedding: 'FLOAT[]'})
  WHERE embedding IS NOT NULL ORDER BY score DESC LIMIT 5"
