#!/bin/sh
# bench_serve.sh [MODEL [SECONDS [CONNECTIONS]]] - qemb-serve under many small requests against ./qemb
# on the same texts, in one run on one machine: tokens/s of both, and the requests' P50 and P99.
# Each request has one text; nothing is cached; wrk, which asks, takes its share of the same cores.
set -eu
model=${1:-models/demo.qemb} seconds=${2:-10} connections=${3:-64}
command -v wrk >/dev/null || { echo "skipped: wrk is not installed"; exit 0; }
dir=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || :; rm -rf "$dir"' EXIT INT TERM

# Distinct sentences of 5 to 20 words.
awk 'BEGIN { srand(1); n = split("the of and search vector river light answer question mountain city paper " \
    "engine water green quick result number house music letter market window garden bridge story", w, " ")
    for (i = 0; i < 20000; i++) { s = "text " i; k = 5 + int(rand() * 16)
        for (j = 0; j < k; j++) s = s " " w[1 + int(rand() * n)]; print s } }' >"$dir/all"
# As many as the pipe computes in about that time: a tenth tells how many.
rate() { sed -n 's/.*(.* texts\/s, \([0-9.]*\) tokens\/s).*/\1/p'; }
texts_rate() { sed -n 's/.*(\([0-9.]*\) texts\/s, .*/\1/p'; }
head -n 500 "$dir/all" | ./qemb -m "$model" --output f32 --stats 2>"$dir/stats" >/dev/null
n=$(awk -v r="$(texts_rate <"$dir/stats")" -v s="$seconds" 'BEGIN { n = int(r * s); print (n < 500 ? 500 : n > 20000 ? 20000 : int(n)) }')
head -n "$n" "$dir/all" >"$dir/texts"
./qemb -m "$model" --output f32 --stats <"$dir/texts" 2>"$dir/stats" >/dev/null
pipe=$(rate <"$dir/stats")

cat >"$dir/ask.lua" <<LUA
local texts, i = {}, 0
for line in io.lines("$dir/texts") do texts[#texts + 1] = line end
wrk.method, wrk.headers["Content-Type"] = "POST", "application/json"
request = function()
    i = i % #texts + 1
    return wrk.format(nil, nil, nil, '{"model":"bench","encoding_format":"base64","input":"' .. texts[i] .. '"}')
end
LUA
"${QEMB_SERVE_BIN:-./qemb-serve}" -m "$model" --name bench --port 0 --cache 0 2>"$dir/log" &
server=$!
until grep -q '"event":"ready"' "$dir/log"; do kill -0 "$server"; sleep 0.1; done
port=$(sed -n 's/.*"event":"listening","port":\([0-9]*\).*/\1/p' "$dir/log")
metric() { curl -s "http://127.0.0.1:$port/metrics" | awk -v n="$1" '$1 == n { print $2 }'; }
before=$(metric qemb_tokens_total)
wrk -t 1 -c "$connections" -d "${seconds}s" --timeout 60s --latency -s "$dir/ask.lua" \
    "http://127.0.0.1:$port/v1/embeddings" >"$dir/wrk"
after=$(metric qemb_tokens_total)
took=$(awk '/requests in/ { t = $4; sub(/s,$/, "", t); print t }' "$dir/wrk")
batches=$(metric qemb_batch_texts_count) texts=$(metric qemb_batch_texts_sum)
kill -TERM "$server" && wait "$server"
server=
case $took in *m) took=$(awk -v t="$took" 'BEGIN { print t * 60 }') ;; esac
awk -v m="$model" -v p="$pipe" -v a="$after" -v b="$before" -v t="$took" -v c="$connections" -v n="$n" -v x="$texts" -v y="$batches" '
    BEGIN { s = (a - b) / t
        printf "%s, %d distinct texts, one a request, %d connections\n", m, n, c
        printf "pipe     %10.0f tokens/s\nserver   %10.0f tokens/s (%.0f %% of the pipe), %.1f texts a batch\n", p, s, 100 * s / p, x / y }'
awk '/50%|99%|Non-2xx|Socket errors|Requests\/sec/' "$dir/wrk"
