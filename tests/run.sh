#!/bin/sh
# run.sh COMMAND... - the runner behind `make test`. Each argument is one command line; all are run,
# whatever the ones before did. Criterion programs report in TAP, the others in their own words; the
# sum closes the output. Exit 0 only if something ran or was skipped and nothing failed.
set -u
passed=0 failed=0 skipped=0
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
export LSAN_OPTIONS="suppressions=$(dirname "$0")/lsan.supp:print_suppressions=0"

count() { grep -cE "$1" "$log"; }
# of pytest's last line, such as "2 failed, 95 passed, 1 skipped in 7.45s"
number() { tail -n 1 "$log" | sed -nE "s/^(.*[^0-9])?([0-9]+) $1.*/\2/p"; }

for command in "$@"; do
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
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    p= s= f=
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ $((passed + skipped)) -gt 0 ]
