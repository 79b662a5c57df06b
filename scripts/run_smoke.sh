#!/usr/bin/env bash
# A short training run on the bundled text:  scripts/run_smoke.sh [pilot|mid] [overrides such as train.steps=20]
set -euo pipefail
cd "$(dirname "$0")/.."
size=${1:-pilot}
case "$size" in
    pilot | mid) ;;
    *) echo "run_smoke.sh: the size must be pilot or mid, got '$size'" >&2; exit 2 ;;
esac
${RUN:-uv run} python train.py --config-name "${size}_smoke" "${@:2}"
