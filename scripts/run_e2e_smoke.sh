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
checkpoint=outputs/$name
$RUN python scripts/eval/zeroshot.py --checkpoint $checkpoint --local-dir tests/eval/data/zeroshot
$RUN python scripts/eval/niah.py --checkpoint $checkpoint \
    --context-lengths 512 1024 --samples-per-length 2 --max-new-tokens 32
$RUN python scripts/eval/continual.py --checkpoints $checkpoint --max-batches 4
