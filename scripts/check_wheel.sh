#!/usr/bin/env bash
# Builds a wheel, installs it alone into a new environment and uses it from another folder:  scripts/check_wheel.sh
# WHEEL=FILE checks that wheel instead of building one; PYTHON=3.13 takes another Python.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${WHEEL:-}" ]; then
    uv build --quiet --wheel --out-dir "$work/dist"
    WHEEL=$(ls "$work"/dist/*.whl)
fi
uv export --quiet --no-dev --no-hashes --no-annotate --no-header --no-emit-project > "$work/constraints.txt"
uv venv --quiet ${PYTHON:+--python "$PYTHON"} "$work/venv"
uv pip install --quiet --python "$work/venv" --constraint "$work/constraints.txt" "$WHEEL"
mkdir "$work/elsewhere"
cd "$work/elsewhere"
export PATH="$work/venv/bin:$PATH" PYTHONPATH=
unset VIRTUAL_ENV
nl doctor
nl train data=bytes name=first train.steps=12 train.eval_every=6 model.dim=32 model.num_heads=2 model.num_layers=1
nl generate outputs/first --prompt "Call me" --max-new-tokens 10
nl eval long-perplexity --checkpoint outputs/first --length 128 --max-samples 4
nl report outputs/first --no-samples
nl audit --config-name pilot_smoke > audit.txt
test -s outputs/first/loss.png && test -s outputs/first/report.html && test -s audit.txt
nl train --config-name pilot --cfg job > pilot.txt
grep -q "name: pilot" pilot.txt
python - << 'END'
import torch
import nested_learning
from nested_learning import HopeBlock, HopeConfig, HopeLM

assert "site-packages" in nested_learning.__file__, nested_learning.__file__
model = HopeLM(HopeConfig(vocab_size=257, dim=32, num_heads=2, num_layers=1, chunk_size=8))
tokens = torch.randint(257, (2, 20))
whole, _ = model(tokens)
start, state = model(tokens[:, :13])
rest, state = model(tokens[:, 13:], state)
torch.testing.assert_close(torch.cat([start, rest], 1), whole, atol=1e-4, rtol=1e-4)


class Mine(torch.nn.Module):  # a HOPE block inside a module of one's own
    def __init__(self):
        super().__init__()
        self.inputs = torch.nn.Linear(3, 32)
        self.hope = HopeBlock(HopeConfig(dim=32, num_heads=2, chunk_size=8))
        self.answer = torch.nn.Linear(32, 1)

    def forward(self, series, state=None):
        features, state = self.hope(self.inputs(series), state)
        return self.answer(features), state


found, _ = Mine()(torch.randn(2, 20, 3))
assert found.shape == (2, 20, 1) and bool(found.isfinite().all())
END
echo "the wheel works"
