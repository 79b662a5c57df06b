#!/usr/bin/env bash
# The RefinedWeb mixture from the hub: tokenizer, shards, checks. Interrupted, run it again: it goes on.
# Limits in records (empty: everything), for example
#   RW_LIMIT=2000000 WIKI_LIMIT=500000 C4_LIMIT=1000000 RPJ_LIMIT=500000 CODE_LIMIT=200000 scripts/data/run_full.sh
# Others: FALLBACK_SPLIT, VOCAB_SIZE, SAMPLE_CHARS, WORKERS, OUTPUT_DIR, TOKENIZER_DIR, TOKENIZER_CONFIG, CONFIG.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUN:-uv run}
CONFIG=${CONFIG:-configs/data/refinedweb_mixture_filtered.yaml}
TOKENIZER_CONFIG=${TOKENIZER_CONFIG:-configs/data/refinedweb_mixture.yaml}
TOKENIZER_DIR=${TOKENIZER_DIR:-outputs/tokenizers/refinedweb}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/data/refinedweb_filtered}
LOG=${LOG:-$OUTPUT_DIR.log}

limits=()
for pair in "refinedweb=${RW_LIMIT:-}" "wikipedia=${WIKI_LIMIT:-}" "c4=${C4_LIMIT:-}" \
            "redpajama=${RPJ_LIMIT:-}" "code=${CODE_LIMIT:-}"; do
    if [ -n "${pair#*=}" ]; then limits+=("$pair"); fi
done
common=(--log-file "$LOG" --fallback-split "${FALLBACK_SPLIT:-train}")
if [ ${#limits[@]} -gt 0 ]; then common+=(--limit "${limits[@]}"); fi

if [ ! -f "$TOKENIZER_DIR/tokenizer.model" ]; then
    $RUN python scripts/data/train_tokenizer.py --manifest "$TOKENIZER_CONFIG" --vocab-size "${VOCAB_SIZE:-32000}" \
        --sample-chars "${SAMPLE_CHARS:-200000000}" --output-dir "$TOKENIZER_DIR" "${common[@]}"
fi
workers=()
if [ -n "${WORKERS:-}" ]; then workers=(--workers "$WORKERS"); fi
$RUN python scripts/data/process_mixture.py "$CONFIG" --tokenizer-path "$TOKENIZER_DIR/tokenizer.model" \
    --output-dir "$OUTPUT_DIR" "${workers[@]}" "${common[@]}"
$RUN python scripts/data/check_tokenizer.py --tokenizer-path "$TOKENIZER_DIR/tokenizer.model" --shards "$OUTPUT_DIR"
$RUN python scripts/data/validate_mixture.py "$CONFIG" --shards "$OUTPUT_DIR"
