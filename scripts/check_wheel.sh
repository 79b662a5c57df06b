#!/usr/bin/env bash
# Builds a wheel, installs it into a new environment and uses it from another folder:  scripts/check_wheel.sh
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv build --quiet --wheel --out-dir "$work/dist"
uv export --quiet --no-dev --no-hashes --no-annotate --no-header --no-emit-project > "$work/constraints.txt"
uv venv --quiet "$work/venv"
uv pip install --quiet --python "$work/venv" --constraint "$work/constraints.txt" "$work"/dist/*.whl
cd "$work"
venv/bin/nl doctor
venv/bin/nl reproduce recall --quick --jobs 1
venv/bin/python - << 'END'
import torch
import nested_learning
from nested_learning import HopeConfig, HopeLM

assert "site-packages" in nested_learning.__file__, nested_learning.__file__
model = HopeLM(HopeConfig(vocab_size=257, dim=32, num_heads=2, num_layers=1, chunk_size=8))
tokens = torch.randint(257, (2, 20))
whole, _ = model(tokens)
start, state = model(tokens[:, :13])
rest, state = model(tokens[:, 13:], state)
torch.testing.assert_close(torch.cat([start, rest], 1), whole, atol=1e-4, rtol=1e-4)
END
echo "the wheel works"
