#!/usr/bin/env bash
# From nothing to evaluations, offline: sync, sample data, smoke training on it, then zero-shot, needle and
# continual-learning evaluation of the checkpoint. Overrides are passed to training, such as train.steps=20.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-uv run}
name=e2e_smoke

if [ "$RUN" = "uv run" ]; then uv sync --quiet; fi
OFFLINE=1 RUN="$RUN" bash scripts/data/run_sample.sh
$RUN python train.py --config-name pilot_smoke data=sample name=$name "$@"
missing=0
for task in zeroshot niah continual; do
    script=scripts/eval/$task.py
    if [ -f "$script" ]; then
        options=()
        if [ "$task" = zeroshot ]; then options=(--local-dir tests/eval/data/zeroshot); fi
        $RUN python "$script" --checkpoint "outputs/$name" "${options[@]}"
    else
        echo "run_e2e_smoke.sh: $script is missing, so this evaluation did not run" >&2
        missing=1
    fi
done
exit $missing
