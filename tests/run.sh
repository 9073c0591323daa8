#!/bin/sh
# run.sh COMMAND... - the runner behind `make test`. Each argument is one command line; all are run,
# whatever the others do, as many at a time as there are CPUs, or $JOBS. So the longest go first.
# Criterion programs report in TAP, the others in their own words; the sum closes the output. Exit 0
# only if something ran or was skipped and nothing failed.
set -u

count() { grep -cE "$1" "$log"; }
# of pytest's last line, such as "2 failed, 95 passed, 1 skipped in 7.45s"
number() { tail -n 1 "$log" | sed -nE "s/^(.*[^0-9])?([0-9]+) $1.*/\2/p"; }

# Runs $command with its output in $log; prints what is to be seen of that, and adds to $dir/sums.
run_one() {
    start=$(date +%s)
    sh -c "$command" >"$log" 2>&1
    status=$?
    if grep -q '^TAP\|^# Criterion' "$log"; then
        s=$(count '^ok .*# SKIP') p=$(($(count '^ok ') - s)) f=$(count '^not ok ')
        grep -E '# SKIP' "$log" | sed 's/^ok - /skipped: /'
    elif tail -n 1 "$log" | grep -qE '[0-9]+ (passed|failed|skipped|errors?)\b.* in [0-9.]+s'; then
        p=$(number passed) s=$(number skipped) f=$(number failed)
        grep -E '^SKIPPED' "$log"
    else # "N tests, ..." and "skipped N tests: why" are counted; any other command is one test
        p=$(sed -nE 's/^([0-9]+) tests, .*/\1/p' "$log" | awk '{ n += $1 } END { print n + 0 }')
        s=$(sed -nE 's/^skipped:.*/1/p; s/^skipped ([0-9]+) tests:.*/\1/p' "$log" | awk '{ n += $1 } END { print n + 0 }')
        f=0
        grep '^skipped' "$log"
        [ $((p + s)) -gt 0 ] || [ $status -ne 0 ] || p=1
    fi
    : "${p:=0}" "${s:=0}" "${f:=0}"
    [ $status -eq 0 ] || [ "$f" -gt 0 ] || f=1
    [ $status -eq 0 ] && [ "$f" -eq 0 ] || cat "$log"
    printf '%-58s %4d passed %2d failed %2d skipped %4d s\n' "$command" "$p" "$f" "$s" $(($(date +%s) - start))
    echo "$p $f $s" >>"$dir/sums"
}

if [ "${1:-}" = --one ]; then # one of several such processes, whose outputs do not mix
    dir=$2 command=$3 log=$(mktemp "$2/log.XXXXXX") || exit 1
    run_one >"$log.seen"
    flock "$dir" cat "$log.seen"
    exit
fi

dir=$(mktemp -d) && : >"$dir/sums" || exit 1
trap 'rm -rf "$dir"' EXIT
export LSAN_OPTIONS="suppressions=$(dirname "$0")/lsan.supp:print_suppressions=0"
printf '%s\0' "$@" | xargs -0 -n 1 -P "${JOBS:-$(nproc)}" "$0" --one "$dir"
awk -v want=$# '{ p += $1; f += $2; s += $3 }
    END { f += want - NR; printf "%d passed, %d failed, %d skipped\n", p, f, s; exit !(!f && p + s) }' "$dir/sums"
