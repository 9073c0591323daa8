#!/bin/sh
# The nearest lines of FILE with PostgreSQL and pgvector, which read what the pipe writes.
#   pgvector.sh MODEL FILE QUESTION        prints score and line number; best first
# The record of a line that cannot be embedded has an error and no vector. The database needs once
# `CREATE EXTENSION vector`; PGHOST, PGDATABASE and PGUSER name it. QEMB names the program.
# JSON has no control characters, so COPY finds neither its quote nor its delimiter in a record.
qemb=${QEMB:-./qemb}
question=$(printf '%s\n' "$3" | "$qemb" -m "$1" --query) || exit 1
"$qemb" -m "$1" --output jsonl <"$2" | psql -qAtX -v ON_ERROR_STOP=1 -F '	' \
  -c "CREATE TEMPORARY TABLE records (record JSONB)" \
  -c "COPY records FROM STDIN (FORMAT csv, QUOTE e'\x01', DELIMITER e'\x02')" \
  -c "CREATE TEMPORARY TABLE vectors AS
      SELECT (record->>'id')::BIGINT AS id, (record->>'embedding')::VECTOR AS vector
      FROM records WHERE record ? 'embedding'" \
  -c "SELECT -(vector <#> '$question'), id FROM vectors ORDER BY vector <#> '$question' LIMIT 5"
