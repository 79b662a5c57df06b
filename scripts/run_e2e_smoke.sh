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
        case $task in
            zeroshot) options=(--local-dir tests/eval/data/zeroshot) ;;
            niah) options=(--context-lengths 512 1024 --samples-per-length 2 --max-new-tokens 32) ;;
            continual) options=(--max-batches 4) ;;
        esac
        $RUN python "$script" --checkpoint "outputs/$name" "${options[@]}"
    else
        echo "run_e2e_smoke.sh: $script is missing, so this evaluation did not run" >&2
        missing=1
    fi
done
exit $missing
