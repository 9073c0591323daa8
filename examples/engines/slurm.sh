#!/bin/bash
#SBATCH --job-name=qemb
#SBATCH --array=0-15
#SBATCH --cpus-per-task=8
#SBATCH --mem=4G
#SBATCH --requeue
#SBATCH --open-mode=append
# Files to vectors by a Slurm array: sbatch slurm.sh MODEL OUT LIST, all on a shared disk.
#
# LIST has the name of a file of JSON lines in each line. Task i of n takes the lines i, i + n, ... ;
# OUT gets NAME.jsonl and NAME.json of each file. A task that Slurm ends and requeues (a node that
# fails, preemption) finds its finished shards and goes on. One whose qemb is killed (memory) runs it
# again, at most three times: Slurm requeues no task that fails. `sbatch` again makes what is missing.
set -u
model=$1 out=$2 list=$3
first=$SLURM_ARRAY_TASK_MIN count=$SLURM_ARRAY_TASK_COUNT
if [ $((SLURM_ARRAY_TASK_MAX - first + 1)) -ne "$count" ]; then
    echo "slurm.sh: the array has gaps (want --array=FIRST-LAST: the slices of LIST depend on it)" >&2
    exit 1
fi
for _ in 1 2 3 4; do
    awk -v i=$((SLURM_ARRAY_TASK_ID - first)) -v n="$count" 'NR % n == i' "$list" |
        qemb shards --model "$model" --out "$out" --threads "$SLURM_CPUS_PER_TASK" \
            --input jsonl --output jsonl --errors-ok -
    status=$?
    [ "$status" -eq 137 ] || exit "$status"
done
exit "$status"
