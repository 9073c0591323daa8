#!/bin/sh
# Files to vectors by GNU parallel: parallel.sh MODEL OUT LIST
#
# LIST has the name of a file of JSON lines in each line. OUT gets NAME.jsonl and NAME.json of each.
# A job takes FILES files, so that the model is opened once for them. A job whose qemb is killed runs
# again, up to four times, and redoes only the shard that was in work. When a tenth of the jobs have
# failed, no more are started. The same command again makes what is missing or has changed; it needs
# no --resume of parallel, which would skip jobs by their number, also when LIST has changed. Other
# machines may join by parallel's --sshlogin if they have MODEL, OUT and the files under these names.
# JOBS processes with one thread each: on one machine, more than its cores gain nothing.
set -eu
model=$1 out=$2 list=$3
mkdir -p "$out"
exec parallel --arg-file "$list" --max-args "${FILES:-16}" --jobs "${JOBS:-$(nproc)}" \
    --retries 4 --halt soon,fail=10% \
    qemb shards --model "$model" --out "$out" --threads 1 --input jsonl --output jsonl --errors-ok
