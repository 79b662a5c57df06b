#!/usr/bin/env bash
# The whole data path in about a minute: tokenizer, shards, checks. Bundled text without a network, a few
# megabytes of FineWeb-Edu and Wikipedia if the hub can be reached (OFFLINE=1: never look).
#   scripts/data/run_sample.sh          then: train with the command it prints
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUN:-uv run}
VOCAB_SIZE=${VOCAB_SIZE:-1024}

hub_answers() {
    [ -z "${OFFLINE:-}" ] && [ "${HF_HUB_OFFLINE:-0}" != 1 ] && $RUN python - <<'PYTHON' 2>/dev/null
from huggingface_hub import HfApi
HfApi().dataset_info("HuggingFaceFW/fineweb-edu", timeout=5)
PYTHON
}

name=sample
if hub_answers; then name=sample_hub; fi
config=configs/data/$name.yaml
tokenizer=outputs/tokenizers/$name
log=outputs/data/$name.log
echo "sample data: $config"
$RUN python scripts/data/validate_mixture.py "$config"
if [ ! -f "outputs/data/$name/mixture.json" ]; then
    $RUN python scripts/data/train_tokenizer.py --manifest "$config" --vocab-size "$VOCAB_SIZE" \
        --sample-chars 4000000 --output-dir "$tokenizer" --log-file "$log"
fi
$RUN python scripts/data/process_mixture.py "$config" --tokenizer-path "$tokenizer/tokenizer.model" --log-file "$log"
$RUN python scripts/data/check_tokenizer.py --tokenizer-path "$tokenizer/tokenizer.model" --shards "outputs/data/$name"
$RUN python scripts/data/validate_mixture.py "$config" --shards "outputs/data/$name"
echo "train on it: uv run python train.py data=$name data.tokenizer.vocab_size=$VOCAB_SIZE name=$name"
