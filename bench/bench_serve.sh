#!/bin/sh
# bench/bench_serve.sh [MODEL [SECONDS [CONNECTIONS]]] - qemb-serve under many small requests against ./qemb
# on the same texts, in one run on one machine: tokens/s of both, and the requests' P50 and P99.
# Each request has one text; nothing is cached; wrk, which asks, takes its share of the same cores. The
# pipe runs before and after the server: if those two differ, the machine was not the benchmark's alone.
set -eu
model=${1:-tests/fixtures/small.qemb} seconds=${2:-10} connections=${3:-64}
command -v wrk >/dev/null || { echo "skipped: wrk is not installed"; exit 0; }
dir=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || :; rm -rf "$dir"' EXIT INT TERM

# Distinct sentences of 5 to 20 words.
awk 'BEGIN { srand(1); n = split("the of and search vector river light answer question mountain city paper " \
    "engine water green quick result number house music letter market window garden bridge story", w, " ")
    for (i = 0; i < 20000; i++) { s = "text " i; k = 5 + int(rand() * 16)
        for (j = 0; j < k; j++) s = s " " w[1 + int(rand() * n)]; print s } }' >"$dir/all"
# As many as the pipe computes in about that time: runs of a second or more tell how many.
rate() { sed -n 's/.*(.* texts\/s, \([0-9.]*\) tokens\/s).*/\1/p' "$dir/stats"; }
pipe() { head -n "$1" "$dir/all" | ./qemb -m "$model" --output f32 --stats 2>"$dir/stats" >/dev/null; }
n=16
while pipe $n; took=$(sed -n 's/.* tokens in \([0-9.]*\) s .*/\1/p' "$dir/stats")
    [ $n -lt 20000 ] && awk -v t="$took" 'BEGIN { exit !(t < 1) }'; do n=$((n * 4)); [ $n -le 20000 ] || n=20000; done
n=$(awk -v n=$n -v t="$took" -v s="$seconds" 'BEGIN { n = int(n * s / t); print (n < 64 ? 64 : n > 20000 ? 20000 : n) }')
head -n "$n" "$dir/all" >"$dir/texts"
pipe "$n"
before=$(rate)

cat >"$dir/ask.lua" <<LUA
local texts, i = {}, 0
for line in io.lines("$dir/texts") do texts[#texts + 1] = line end
wrk.method, wrk.headers["Content-Type"] = "POST", "application/json"
request = function()
    i = i % #texts + 1
    return wrk.format(nil, nil, nil, '{"model":"bench","encoding_format":"base64","input":"' .. texts[i] .. '"}')
end
LUA
: >"$dir/log"
"${QEMB_SERVE_BIN:-./qemb-serve}" -m "$model" --name bench --port 0 --cache 0 2>"$dir/log" &
server=$!
until grep -q '"event":"ready"' "$dir/log"; do kill -0 "$server"; sleep 0.1; done
port=$(sed -n 's/.*"event":"listening","port":\([0-9]*\).*/\1/p' "$dir/log")
metric() { curl -s "http://127.0.0.1:$port/metrics" | awk -v n="$1" '$1 == n { print $2 }'; }
wrk -t 1 -c "$connections" -d "${seconds}s" --timeout 60s --latency -s "$dir/ask.lua" \
    "http://127.0.0.1:$port/v1/embeddings" >"$dir/wrk"
# From the log: the tokens of the answers after the first ones, by the time from those to the last. So
# what a batch has half done when wrk begins or ends counts neither way.
server_rate=$(sed -n 's/.*T\(..\):\(..\):\([0-9.]*\)Z.*"status":200,.*"tokens":\([0-9]*\).*/\1 \2 \3 \4/p' "$dir/log" |
    awk '{ t = $1 * 3600 + $2 * 60 + $3; if (NR == 1) first = t; if (t < first) t += 86400
           if (t < first + 0.2) t0 = t; else { sum += $4; t1 = t } }
         END { if (t1 > t0) printf "%.1f", sum / (t1 - t0); else print 0 }')
batches=$(metric qemb_batch_texts_count) texts=$(metric qemb_batch_texts_sum)
kill -TERM "$server" && wait "$server"
server=
pipe "$n"
awk -v m="$model" -v p="$before" -v q="$(rate)" -v s="$server_rate" -v c="$connections" -v n="$n" -v x="$texts" -v y="$batches" '
    BEGIN { printf "%s, %d distinct texts, one a request, %d connections\n", m, n, c
        printf "pipe     %10.1f tokens/s before, %.1f after\n", p, q
        printf "server   %10.1f tokens/s (%.0f %% of their mean), %.1f texts a batch\n", s, 200 * s / (p + q), x / y }'
awk '/50%|99%|Non-2xx|Socket errors|Requests\/sec/' "$dir/wrk"
