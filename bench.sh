#!/bin/bash
# bench.sh - the speed of everything, on one machine, in one run.
#
#   ./bench.sh [-m MODEL.qemb] [-o DIRECTORY] [--threads N] [--tokens N] [--math MATHS] [--only PARTS]
#              [--lengths LENGTHS] [--peer 'COMMAND']... [--rounds N] [--cpu-time] [--append]
#
# Parts: ops, gemm, beside, forward, tokenizer, print, scan (build/release/qemb-bench, see bench/bench.c), run (the program
# itself, lists of ids in, tokens per second out), latency (one line in, one vector out, the program
# already running), peer. All but tokenizer, print and scan once per arithmetic of MATHS ("f32 bf16 int16 int8",
# as far as this CPU has them); beside, forward, run and peer once per length ("16 64 512 4096" tokens a text).
#
# --peer COMMAND is another program on the same texts: a text a line on its standard input, or in the
# file that {file} in COMMAND stands for; {threads} and {length} are the threads and the tokens of a
# text. bench/peers/ has one script per program, each of which says what to install and how to give
# both the same weights. As they are in the list below, MODEL is a directory or a GGUF file:
#   bench/peers/run_torch.py MODEL {threads} {file} --turns [--dtype bfloat16]
#   bench/peers/run_openvino.py MODEL {threads} {file} --turns [--hint bf16] [--weights int8]
#   bench/peers/run_sentence_transformers.py MODEL {threads} {file} --turns      (an encoder)
#   bench/peers/llama.sh MODEL {threads} {file} {length}
# With --turns in it, COMMAND stays. Whenever it reads a line, it computes all texts and prints the line
# "done": qemb and it take turns, call by call, gated as in measure.h. Without, both are run as a whole in turns, ROUNDS (3)
# times each, once on all texts and once on the first alone; the ratio of the medians is printed for
# the whole run, and for the rate without what starting takes: the further texts in the further time,
# empty where there was none. Whole runs are not gated. Above 1 (100 %) qemb is faster.
#
# Results: a table on stdout; DIRECTORY (bench/results) gets bench.csv, bench.json and, where gnuplot
# is installed, bench.svg: throughput against the length of a text, a curve per arithmetic. --append
# keeps the rows that are in bench.csv, so that a long measurement can be had in pieces.
set -u
cd "$(dirname "$0")" || exit 1
model=tests/fixtures/small.qemb out=bench/results threads=$(nproc) tokens=8192 cpu_time='' rounds=3 append=''
parts='ops gemm beside forward tokenizer print scan run latency peer' lengths='16 64 512 4096' maths='' tables='' peers=()

fail() { echo "bench.sh: $*" >&2; exit 1; }
usage() { sed -n '4,6s/^# *//p' "$0" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
    --cpu-time) cpu_time=$1; shift; continue ;;
    --append) append=1; shift; continue ;;
    -m|-o|--threads|--tokens|--only|--peer|--math|--lengths|--rounds) [ $# -gt 1 ] || usage ;;
    *) usage ;;
    esac
    case $1 in
    -m) model=$2 ;;
    -o) out=$2 ;;
    --threads) threads=$2 ;;
    --tokens) tokens=$2 ;;
    --only) parts=$2 ;;
    --peer) peers+=("$2") ;;
    --math) maths=$2 ;;
    --lengths) lengths=$2 ;;
    --rounds) rounds=$2 ;;
    esac
    shift 2
done
bench=build/release/qemb-bench
for f in "$model" "$bench" ./qemb; do
    [ -e "$f" ] || fail "$f: is not there (make bench builds the programs)"
done
mkdir -p "$out" || exit 1
csv=$out/bench.csv
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT

# The fastest table of each arithmetic. Its name selects it: --math may be served by another one.
declare -A table
while read -r name m; do table[$m]=$name; done < <("$bench" tables)
if [ -z "$maths" ]; then
    for m in f32 bf16 int16 int8; do [ -n "${table[$m]:-}" ] && maths+="$m "; done
fi
for m in $maths; do
    [ -n "${table[$m]:-}" ] || fail "--math: $m is not on this machine"
    tables+="${tables:+ }${table[$m]}"
done
most=$(./qemb info -m "$model" | awk '/^longest text/ { print $3 }')
lengths=$(for n in $lengths; do [ "$n" -le "${most:-4096}" ] && echo "$n"; done)

machine="$(lscpu 2>/dev/null | sed -n 's/^Model name: *//p' | head -n 1), family $(lscpu | sed -n 's/^CPU family: *//p') model $(lscpu | sed -n 's/^Model: *//p')"
compiler=$(${CC:-gcc} --version | head -n 1)
commit=$(git describe --always --dirty 2>/dev/null)
if [ -z "$append" ] || [ ! -s "$csv" ]; then
    printf '# %s, %s CPUs, %s threads; %s; commit %s; %s; clock: %s; tables: %s\ngroup,name,math,n,median,p10,p90,unit,percent,limit,counted\n' \
        "$machine" "$(nproc)" "$threads" "$compiler" "$commit" "$(basename "$model")" "${cpu_time:+cpu}${cpu_time:-wall}" "$tables" >"$csv"
fi

want() { case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
# Rows on stdin, without the column `math`, go to the CSV with $1 in it and, as a table, to stdout.
record() {
    awk -F, -v OFS=, -v math="$1" '{ NF = 10; $2 = $2 OFS math; print; fflush() }' | tee -a "$csv" | awk -F, '{
        printf "%-10s %-34s %-5s %5s %12s %-9s", $1, $2, $3, $4, $5, $8
        if ($6 != "") printf " (%s .. %s)", $6, $7
        if ($9 != "") printf "  %s %% of %s", $9, $10
        if ($11 != "") printf "  %s quiet", $11
        print ""; fflush() }'
}
# median, p10 and p90 of the numbers on stdin, with commas between
quantiles() { sort -g | awk '{ v[NR] = $1 } END { printf "%s,%s,%s", v[int((NR + 1) / 2)], v[int(NR / 10) + 1], v[NR - int(NR / 10)] }'; }
seconds_of() { local start=$EPOCHREALTIME; "$@" || return; awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { print b - a }'; }
# qemb in arithmetic $1
engine() { local m=$1; shift; ./qemb -m "$model" --threads "$threads" --quiet --cpu "${table[$m]}" "$@"; }

common=(--threads "$threads" $cpu_time)
for m in $maths; do
    want ops && "$bench" ops "$model" "${common[@]}" --cpu "${table[$m]}" | record "$m"
    want gemm && "$bench" gemm "$model" "${common[@]}" --cpu "${table[$m]}" | record "$m"
    # shellcheck disable=SC2086
    want beside && "$bench" beside "$model" $lengths "${common[@]}" --cpu "${table[$m]}" --tokens "$tokens" | record "$m"
    # shellcheck disable=SC2086
    want forward && "$bench" forward "$model" $lengths "${common[@]}" --cpu "${table[$m]}" --tokens "$tokens" | record "$m"
done
want tokenizer && "$bench" tokenizer "$model" tests/fixtures/small.txt HACKING.md tokenizer.c "${common[@]}" --threads 1 | record ''
want print && "$bench" print "$model" "${common[@]}" --threads 1 | record ''
want scan && "$bench" scan "$model" 100000 1000000 "${common[@]}" | record ''

# The program, ids in and floats out. Its --stats count from the first record on.
run_length() { # math, length
    for ((r = 0; r < rounds; r++)); do
        engine "$1" --input jsonl --output f32 --stats <"$tmp/ids" 2>"$tmp/stats" >/dev/null || fail "qemb failed: $(cat "$tmp/stats")"
        sed -nE 's/.*\(([0-9.]+) texts\/s, ([0-9.]+) tokens\/s.*/\1 \2/p' "$tmp/stats"
    done >"$tmp/rates"
    echo "run,texts,$2,$(cut -d' ' -f1 "$tmp/rates" | quantiles),texts/s,,"
    echo "run,tokens,$2,$(cut -d' ' -f2 "$tmp/rates" | quantiles),tokens/s,,"
    echo "run,peak memory,$2,$(sed -nE 's/.*peak memory ([0-9.]+) MiB.*/\1/p' "$tmp/stats"),,,MiB,,"
}
if want run; then
    for n in $lengths; do
        awk -v n="$n" -v t="$tokens" 'BEGIN { srand(1); for (i = 0; i < t / n; i++) {
            printf "{\"ids\":["; for (k = 2; k < n; k++) printf "%d,", int(rand() * 250); print "1]}" } }' >"$tmp/ids"
        for m in $maths; do run_length "$m" "$n" | record "$m"; done
    done
fi

if want latency; then
    for m in $maths; do
        coproc program { engine "$m"; }
        for ((r = -3; r < 20; r++)); do # three to warm up
            start=$EPOCHREALTIME
            echo "the quick brown fox jumps over the lazy dog $r" >&"${program[1]}"
            read -r vector <&"${program[0]}" || fail "no vector came back"
            [ "$r" -lt 0 ] || awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { print (b - a) * 1000 }'
        done >"$tmp/latency"
        eval "exec ${program[1]}>&-"
        wait "$program_PID"
        echo "latency,one line,1,$(quantiles <"$tmp/latency"),ms,," | record "$m"
    done
fi

# $tmp/all: texts of exactly $1 tokens, those that the model adds included, in the words of small.txt;
# $tmp/one: the first of them. A word after a space is a pre-token: its tokens can be counted alone.
# They begin with two letters in turn: a token that all began with qemb would compute once.
make_texts() {
    tr -cs 'A-Za-z' '\n' <tests/fixtures/small.txt | awk 'NF && !seen[$0]++' >"$tmp/words"
    # "a" is one token, beside those that the model adds to every text
    local a; a=$(echo a | ./qemb tokenize -m "$model" | awk -F, '{ print NF }')
    sed 's/^/a /' "$tmp/words" | ./qemb tokenize -m "$model" | awk -F, -v a="$a" '{ print NF - a }' |
        paste -d ' ' - "$tmp/words" | awk -v length_="$1" -v t="$tokens" -v a="$a" '{ cost[NR] = $1; word[NR] = $2 }
            END { srand(2); for (i = 0; i < t / length_ || i < 2; i++) { printf i % 2 ? "a" : "b"
                for (left = length_ - a; left > 0;) { w = int(rand() * NR) + 1
                    if (cost[w] <= left) { printf " %s", word[w]; left -= cost[w] } } print "" } }' >"$tmp/all"
    head -n 1 "$tmp/all" >"$tmp/one"
    ./qemb tokenize -m "$model" <"$tmp/all" | awk -F, -v n="$1" 'NF != n { exit 1 }' || fail "the texts are not $1 tokens long"
}
# The command of peer $1 on file $2 of texts of $3 tokens
command_of() {
    local c=${1//\{file\}/$2}
    c=${c//\{threads\}/$threads}
    printf %s "${c//\{length\}/$3}"
}
them() { sh -c "$(command_of "$@")" <"$2" >/dev/null 2>"$tmp/peer"; }
takes_turns() { [[ " $1 " == *' --turns '* ]]; }
# Rows of qemb in arithmetic $1 in turns with peer $2, which has number $3, on texts of $4 tokens
turn_rows() {
    "$bench" turns "$model" "$(command_of "$2" "$tmp/all" "$4")" "$tmp/all" "${common[@]}" --math "$1" --tokens 1024 2>"$tmp/peer" |
        awk -F, -v OFS=, -v p="$3" -v n="$4" '$1 == "turns" { $1 = "peer"; $3 = n; rows++
            $2 = $2 == "qemb" ? "qemb beside peer " p : $2 == "peer" ? "peer " p : "qemb of peer " p; print } END { exit rows < 3 }' ||
        fail "peer failed: $2: $(tail -n 3 "$tmp/peer")"
}
us() { engine "$1" <"$2" >/dev/null; }
# Median seconds of $tmp/$1.all, and the rate of all texts but the first, tokens/s. $2: length
whole() { sort -g "$tmp/$1.all" | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
# nothing where a round's further texts took no further time: too few to tell
rate() { paste -d ' ' "$tmp/$1.all" "$tmp/$1.one" | awk -v n="$2" -v texts="$(wc -l <"$tmp/all")" '$1 <= $2 { exit } { print (texts - 1) * n / ($1 - $2) }' | sort -g | awk -v rounds="$rounds" '{ v[NR] = $1 } END { if (NR == rounds) print v[int((NR + 1) / 2)] }'; }
peer_rows() { # key, name, length
    echo "peer,$2: whole run,$3,$(quantiles <"$tmp/$1.all"),s,,"
    echo "peer,$2: rate,$3,$(rate "$1" "$3"),,,tokens/s,,"
}
peer_length() { # length
    local whole=()
    make_texts "$1"
    for p in "${!peers[@]}"; do
        takes_turns "${peers[p]}" || { whole+=("$p"); continue; }
        for m in $maths; do
            turn_rows "$m" "${peers[p]}" $((peers_before + p + 1)) "$1" >"$tmp/turns" || exit 1
            record "$m" <"$tmp/turns"
        done
    done
    [ ${#whole[@]} = 0 ] && return
    rm -f "$tmp"/*.all "$tmp"/*.one
    for ((r = 0; r < rounds; r++)); do
        # The first text alone, untimed: what a program waits for where a virtual machine's host has taken
        # back the memory of the one before is neither's, and would count in `all` but not in `one`.
        for m in $maths; do
            us "$m" "$tmp/one"
            for part in all one; do
                seconds_of us "$m" "$tmp/$part" >>"$tmp/us-$m.$part" || fail "qemb failed"
            done
        done
        for p in "${whole[@]}"; do
            them "${peers[p]}" "$tmp/one" "$1"
            for part in all one; do
                seconds_of them "${peers[p]}" "$tmp/$part" "$1" >>"$tmp/them-$p.$part" || fail "peer failed: ${peers[p]}: $(tail -n 3 "$tmp/peer")"
            done
        done
    done
    for m in $maths; do peer_rows "us-$m" qemb "$1" | record "$m"; done
    for p in "${whole[@]}"; do
        i=$((peers_before + p + 1))
        peer_rows "them-$p" "peer $i" "$1" | record ''
        for m in $maths; do
            {
                awk -v p=$i -v n="$1" -v a="$(whole "us-$m")" -v b="$(whole "them-$p")" 'BEGIN { printf "peer,qemb against peer %d: whole run,%d,%.3f,,,x,,\n", p, n, b / a }'
                awk -v p=$i -v n="$1" -v a="$(rate "us-$m" "$1")" -v b="$(rate "them-$p" "$1")" 'BEGIN { printf "peer,qemb against peer %d: rate,%d,%s,,,x,,\n", p, n, a == "" || b == "" ? "" : sprintf("%.3f", a / b) }'
            } | record "$m"
        done
    done
}
if want peer && [ ${#peers[@]} -gt 0 ]; then
    peers_before=$(grep -c '^# peer ' "$csv") # numbered on where --append goes on
    for p in "${!peers[@]}"; do echo "# peer $((peers_before + p + 1)): ${peers[p]//$'\n'/ }" | tee -a "$csv"; done
    for n in $lengths; do peer_length "$n"; done
fi

# The same rows as JSON, with where they come from.
{
    printf '{"machine": "%s", "cpus": %s, "threads": %s, "compiler": "%s", "commit": "%s", "date": "%s", "model": "%s", "clock": "%s", "tables": "%s", ' \
        "$machine" "$(nproc)" "$threads" "$compiler" "$commit" "$(date -u +%FT%TZ)" "$(basename "$model")" "${cpu_time:+cpu}${cpu_time:-wall}" "$tables"
    sed -n 's/^# peer [0-9]*: //p' "$csv" | awk 'BEGIN { printf "\"peers\": [" } { gsub(/\\/, "\\\\"); gsub(/"/, "\\\""); printf "%s\"%s\"", (NR > 1 ? ", " : ""), $0 } END { print "], \"rows\": [" }'
    awk -F, 'function num(x) { return x == "" ? "null" : x } /^#/ || /^group,/ { next } {
        printf "%s{\"group\": \"%s\", \"name\": \"%s\", \"math\": \"%s\", \"n\": %s, \"median\": %s, \"p10\": %s, \"p90\": %s, \"unit\": \"%s\", \"percent\": %s, \"limit\": \"%s\", \"counted\": \"%s\"}",
        (rows++ ? ",\n" : ""), $1, $2, $3, $4, num($5), num($6), num($7), $8, num($9), $10, $11 } END { print "\n]}" }' "$csv"
} >"$out/bench.json"
if command -v gnuplot >/dev/null && grep -q '^forward,tokens' "$csv"; then
    plots=''
    for m in f32 bf16 int16 int8; do
        grep "^forward,tokens,$m," "$csv" | awk -F, '{ row[$4] = $0 } END { for (n in row) print row[n] }' | sort -t , -k 4n >"$tmp/plot-$m"
        [ -s "$tmp/plot-$m" ] && plots+="${plots:+, }'$tmp/plot-$m' using 4:5:6:7 with yerrorlines title '$m' noenhanced"
    done
    gnuplot <<PLOT
set terminal svg size 640,400 background rgb "white"; set output "$out/bench.svg"; set datafile separator ","
set logscale x 2; set yrange [0:*]; set grid; set key top right; set xlabel "tokens a text"; set ylabel "tokens/s"
set title "$(basename "$model"), $threads threads, $machine" noenhanced
plot $plots
PLOT
fi
echo "results: $out/bench.csv, bench.json$([ -e "$out/bench.svg" ] && echo ', bench.svg')"
