"""Step time of the optimizers on the parameters of a language model, against torch's Muon.

uv run nl bench optimizers --output results/optimizers
uv run nl bench optimizers --dim 64 --layers 1 --repeats 1 --output outputs/optimizers
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from nested_learning.bench.optimizers import StepSettings, markdown, measure
from nested_learning.command import Parser
from nested_learning.models.config import HopeConfig
from nested_learning.runtime import pick_device


def parser() -> Parser:
    """Size of the model and length of the run."""
    made = Parser(description=__doc__)
    for name, default in {
        "dim": 256,
        "layers": 4,
        "heads": 4,
        "vocab": 512,
        "repeats": 5,
        "threads": 1,
    }.items():
        made.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    made.add_argument("--mixer", default="attention")
    made.add_argument("--device", default="cpu")
    made.add_argument("--other", help="an optimizer from elsewhere to time beside ours: file.py:Class")
    made.add_argument("--other-options", nargs="*", default=[], help="its keyword arguments: key=number")
    made.add_argument(
        "--output", type=Path, required=True, help="folder for optimizers.json and optimizers.md"
    )
    return made


def main() -> None:
    """Parse, measure, write."""
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    device = str(pick_device(options.device, "--device"))
    model = HopeConfig(
        vocab_size=options.vocab,
        dim=options.dim,
        num_layers=options.layers,
        num_heads=options.heads,
        mixer=options.mixer,
    )
    more = {
        key: json.loads(value) for key, _, value in (pair.partition("=") for pair in options.other_options)
    }
    settings = StepSettings(
        model=model, repeats=options.repeats, device=device, other=options.other, other_options=more
    )
    result = measure(settings, lambda message: print(message, file=sys.stderr, flush=True))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "optimizers.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "optimizers.md").write_text(markdown(result))
    print(markdown(result))
