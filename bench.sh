#!/bin/bash
# bench.sh - the speed of everything, on one machine, in one run.
#
#   ./bench.sh [-m MODEL.qemb] [-o DIRECTORY] [--threads N] [--tokens N] [--cpu-time] [--only PARTS]
#              [--peer 'COMMAND']... [--words N] [--rounds N]
#
# Parts: ops, forward, tokenizer, print (build/release/bench, see bench.c), run (the program itself,
# lists of ids in, tokens per second out, at 16, 64, 512 and 4096 tokens a text), latency (one line
# in, one vector out, the program already running), peer. --peer COMMAND is given the same lines of
# text on standard input as qemb; both run whole, in turns, and the ratio of the median times is
# printed (above 1: qemb is faster). Give it the same weights and the same number of threads.
# Results: a table on stdout; DIRECTORY (bench/results) gets bench.csv, bench.json and, where
# gnuplot is installed, bench.svg: throughput against the length of a text.
set -u
cd "$(dirname "$0")" || exit 1
model=models/demo.qemb out=bench/results threads=$(nproc) tokens=8192 cpu_time='' words=60 rounds=3
parts='ops forward tokenizer print run latency peer' peers=()

usage() { sed -n '3,4s/^# *//p' "$0" >&2; exit 1; }
while [ $# -gt 0 ]; do
    case $1 in
    --cpu-time) cpu_time=$1; shift; continue ;;
    -m|-o|--threads|--tokens|--only|--peer|--words|--rounds) [ $# -gt 1 ] || usage ;;
    *) usage ;;
    esac
    case $1 in
    -m) model=$2 ;;
    -o) out=$2 ;;
    --threads) threads=$2 ;;
    --tokens) tokens=$2 ;;
    --only) parts=$2 ;;
    --peer) peers+=("$2") ;;
    --words) words=$2 ;;
    --rounds) rounds=$2 ;;
    esac
    shift 2
done
bench=build/release/bench
for f in "$model" "$bench" ./qemb; do
    [ -e "$f" ] || { echo "bench.sh: $f: is not there (make bench builds the programs)" >&2; exit 1; }
done
mkdir -p "$out" || exit 1
csv=$out/bench.csv
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
printf 'group,name,n,median,p10,p90,unit,percent,limit\n' >"$csv"

want() { case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
# Rows on stdin go to the CSV and, as a table, to stdout.
record() {
    tee -a "$csv" | awk -F, '{ printf "%-16s %-30s %5s %12s %-9s", $1, $2, $3, $4, $7
        printf $5 == "" ? "\n" : " (%s .. %s)" ($8 == "" ? "\n" : "  %s %% of %s\n"), $5, $6, $8, $9 }'
}
fail() { echo "bench.sh: $*" >&2; exit 1; }
# median, p10 and p90 of the numbers on stdin, with commas between
quantiles() { sort -g | awk '{ v[NR] = $1 } END { printf "%s,%s,%s", v[int((NR + 1) / 2)], v[int(NR / 10) + 1], v[NR - int(NR / 10)] }'; }
seconds_of() { local start=$EPOCHREALTIME; "$@" || return; awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { print b - a }'; }

common=(--threads "$threads" $cpu_time)
want ops && "$bench" ops "$model" "${common[@]}" | record
most=$(./qemb info -m "$model" | awk '/^longest text/ { print $3 }')
lengths=$(for n in 16 64 512 4096; do [ "$n" -le "${most:-4096}" ] && echo "$n"; done)
want forward && "$bench" forward "$model" $lengths "${common[@]}" --tokens "$tokens" | record
want tokenizer && "$bench" tokenizer "$model" models/demo.txt HACKING.md tokenizer.c "${common[@]}" --threads 1 | record
want print && "$bench" print "$model" "${common[@]}" --threads 1 | record

# The program, ids in and floats out. Its --stats count from the first record on.
run_ids() { ./qemb -m "$model" --input jsonl --output f32 --threads "$threads" --stats --quiet <"$tmp/ids" 2>"$tmp/stats" >/dev/null; }
if want run; then
    for n in $lengths; do
        awk -v n="$n" -v t="$tokens" 'BEGIN { srand(1); for (i = 0; i < t / n; i++) {
            printf "{\"ids\":["; for (k = 2; k < n; k++) printf "%d,", int(rand() * 250); print "1]}" } }' >"$tmp/ids"
        for ((r = 0; r < rounds; r++)); do
            run_ids || fail "qemb failed: $(cat "$tmp/stats")"
            sed -nE 's/.*\(([0-9.]+) texts\/s, ([0-9.]+) tokens\/s.*/\1 \2/p' "$tmp/stats"
        done >"$tmp/rates"
        echo "run,texts,$n,$(cut -d' ' -f1 "$tmp/rates" | quantiles),texts/s,,"
        echo "run,tokens,$n,$(cut -d' ' -f2 "$tmp/rates" | quantiles),tokens/s,,"
        echo "run,peak memory,$n,$(sed -nE 's/.*peak memory ([0-9.]+) MiB.*/\1/p' "$tmp/stats"),,,MiB,,"
    done | record
fi

if want latency; then
    coproc engine { exec ./qemb -m "$model" --threads "$threads" --quiet; }
    for ((r = -3; r < 20; r++)); do # three to warm up
        start=$EPOCHREALTIME
        echo "the quick brown fox jumps over the lazy dog $r" >&"${engine[1]}"
        read -r vector <&"${engine[0]}" || fail "no vector came back"
        [ "$r" -lt 0 ] || awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { print (b - a) * 1000 }'
    done >"$tmp/latency"
    eval "exec ${engine[1]}>&-"
    echo "latency,one line,1,$(quantiles <"$tmp/latency"),ms,," | record
fi

if want peer && [ ${#peers[@]} -gt 0 ]; then
    tr -cs 'A-Za-z' '\n' <models/demo.txt | awk -v words="$words" -v t="$tokens" 'NF { w[n++] = $1 } END {
        srand(2); for (i = 0; i < t / words; i++) { for (k = 0; k < words; k++) printf "%s ", w[int(rand() * n)]; print "" } }' >"$tmp/texts"
    us() { ./qemb -m "$model" --threads "$threads" --quiet <"$tmp/texts" >/dev/null; }
    for p in "${peers[@]}"; do
        them() { sh -c "$p" <"$tmp/texts" >/dev/null 2>"$tmp/peer"; }
        : >"$tmp/us"; : >"$tmp/them"
        for ((r = 0; r < rounds; r++)); do
            seconds_of us >>"$tmp/us" || fail "qemb failed"
            seconds_of them >>"$tmp/them" || fail "peer failed: $p: $(tail -n 3 "$tmp/peer")"
        done
        a=$(quantiles <"$tmp/us") b=$(quantiles <"$tmp/them")
        echo "peer,qemb,$words,$a,s,,"
        echo "peer,\"${p//[,\"]/ }\",$words,$b,s,,"
        awk -v a="${a%%,*}" -v b="${b%%,*}" -v n="$words" 'BEGIN { printf "peer,ratio,%d,%.3f,,,times,,\n", n, b / a }'
    done | record
fi

# The same rows as JSON, with where they come from.
{
    machine=$(lscpu 2>/dev/null | sed -n 's/^Model name: *//p' | head -n 1)
    printf '{"machine": "%s", "cpus": %s, "threads": %s, "compiler": "%s", "commit": "%s", "date": "%s", "model": "%s", "clock": "%s", "rows": [\n' \
        "$machine" "$(nproc)" "$threads" "$(${CC:-gcc} --version | head -n 1)" "$(git describe --always --dirty 2>/dev/null)" \
        "$(date -u +%FT%TZ)" "$(basename "$model")" "${cpu_time:+cpu}${cpu_time:-wall}"
    awk -F, 'function num(x) { return x == "" ? "null" : x } NR > 1 { gsub(/"/, "", $2)
        printf "%s{\"group\": \"%s\", \"name\": \"%s\", \"n\": %s, \"median\": %s, \"p10\": %s, \"p90\": %s, \"unit\": \"%s\", \"percent\": %s, \"limit\": \"%s\"}",
        (NR > 2 ? ",\n" : ""), $1, $2, $3, num($4), num($5), num($6), $7, num($8), $9 } END { print "\n]}" }' "$csv"
} >"$out/bench.json"
if command -v gnuplot >/dev/null && grep -q '^run,tokens' "$csv"; then
    grep '^run,tokens' "$csv" >"$tmp/plot"
    gnuplot <<PLOT
set terminal svg size 640,400; set output "$out/bench.svg"; set datafile separator ","
set logscale x 2; set yrange [0:*]; set grid; set xlabel "tokens a text"; set ylabel "tokens/s"
plot "$tmp/plot" using 3:4:5:6 with yerrorlines title "qemb $(basename "$model"), $threads threads" noenhanced
PLOT
fi
echo "results: $out/bench.csv, bench.json$([ -e "$out/bench.svg" ] && echo ', bench.svg')"
