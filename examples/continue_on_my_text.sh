#!/usr/bin/env bash
# Continue on a text of yours, and see what was forgotten: HOPE beside a plain Transformer. docs/tutorial_own_text.md
#     examples/continue_on_my_text.sh FILE [--quick] [overrides of both trainings such as train.seq_len=128]
# BASE is the text that is learned first, OUT the folder of what is made.
set -euo pipefail
if [ $# -eq 0 ] || ! [ -e "$1" ]; then
    echo "continue_on_my_text.sh: the first argument must be a text file or a folder of them, got '${1:-}'" >&2
    exit 2
fi
mine=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
base=${BASE:-src/nested_learning/data/text/novel.txt}
out=${OUT:-outputs/my_text}
run=${RUN:-uv run}
steps=200 more=60 size=(model.dim=64 model.num_layers=2 model.num_heads=2)
if [ "${1:-}" = --quick ]; then # to see that it works; the models learn next to nothing
    shift
    steps=8 more=4 size=(model.dim=16 model.num_layers=1 model.num_heads=1)
fi
for model in "hope levels=fast" "transformer levels=mlp"; do
    name=${model%% *}
    $run python train.py model=$model "${size[@]}" "data.files=[$base]" train.steps=$steps \
        train.output_dir="$out" name="$name/base" "$@"
    $run python train.py train.init_from="$out/$name/base" "data.files=[$mine]" train.steps=$more optim.lr=1e-3 \
        train.output_dir="$out" name="$name/mine" "$@"
    $run nl eval continual --checkpoints "$out/$name/base" "$out/$name/mine" --texts base="$base" mine="$mine" \
        --output "$out/$name.json"
done
$run nl eval forgetting "$out/hope.json" "$out/transformer.json" --output "$out/forgetting.png"
