#!/usr/bin/env bash
# Continue on a text of yours, and see what was forgotten: HOPE beside a plain Transformer. docs/tutorial_own_text.md
#     examples/continue_on_my_text.sh my.txt [--quick] [overrides such as train.batch_size=4]
set -euo pipefail
mine=$(realpath "${1:?give a text file}") && shift
cd "$(dirname "$0")/.."
base=${BASE:-src/nested_learning/data/text/novel.txt} out=${OUT:-outputs/my_text} run=${RUN:-uv run}
steps=200 more=60 size=(model.dim=64 model.num_layers=2 model.num_heads=2)
if [ "${1:-}" = --quick ]; then shift && steps=8 more=4 size=(model.dim=16 model.num_layers=1 model.num_heads=1); fi
for model in "hope levels=fast" "transformer levels=mlp"; do
    name=${model%% *}
    $run python train.py model=$model "${size[@]}" "data.files=[$base]" train.steps=$steps train.output_dir=$out name=$name/base "$@"
    $run python train.py train.init_from=$out/$name/base "data.files=[$mine]" train.steps=$more optim.lr=1e-3 train.output_dir=$out name=$name/mine "$@"
    $run nl eval continual --checkpoints $out/$name/base $out/$name/mine --texts novel=$base mine=$mine --output $out/$name.json
done
$run nl eval forgetting $out/hope.json $out/transformer.json --output $out/forgetting.png
