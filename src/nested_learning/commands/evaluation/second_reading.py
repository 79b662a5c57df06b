"""How much a pretrained Hugging Face model keeps of a text that it has read once (docs/pretrained.md).

uv run nl eval second-reading --model FOLDER --layers 12 6,9,12,15 --lr 0.01 0.1 1000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from nested_learning.checks import at_least
from nested_learning.command import Parser
from nested_learning.data.corpus import bundled_files
from nested_learning.eval.second_reading import second_readings, table

SKIP = 20_000
"""Characters left out at the start of a text: its title and contents."""


def numbers(text: str) -> tuple[int, ...]:
    """The numbers in a text such as `6,9,12`."""
    return tuple(int(part) for part in text.split(","))


def parser() -> Parser:
    """The options of `nl eval second-reading`."""
    texts = bundled_files()[0].parent
    made = Parser(description=__doc__)
    add = made.add_argument
    add("--model", required=True, help="folder of a Hugging Face model with its tokenizer")
    layers = "layers that learn, as 6,9,12; several choices"
    add("--layers", type=numbers, nargs="+", required=True, help=layers)
    add("--lr", type=float, nargs="+", default=[0.1], help="rates (default 0.1)")
    add("--steps", type=int, nargs="+", default=[1], help="steps on a chunk (default 1)")
    add("--length", type=int, default=512, help="tokens of a text (default %(default)s)")
    add("--passage", type=Path, default=texts / "novel.txt", help="what is learned (default %(default)s)")
    add("--other", type=Path, default=texts / "plays.txt", help="what is not (default %(default)s)")
    return made


def main() -> None:
    """Measure and print the table."""
    options = parser().parse_args()
    at_least("--length", options.length, 1)
    if not (Path(options.model) / "config.json").is_file():
        raise FileNotFoundError(f"--model {options.model} has no config.json of a Hugging Face model")
    texts = [read(file, options.length) for file in (options.passage, options.other)]
    print(measure(options, texts), end="")


def read(file: Path, length: int) -> str:
    """Enough of a text for `length` tokens, without its title and contents."""
    return file.read_text(encoding="utf-8")[SKIP : SKIP + 8 * length]


def measure(options: argparse.Namespace, texts: list[str]) -> str:
    """The table for the passage and the other text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    passage, other = (torch.tensor([tokenizer(text).input_ids])[:, : options.length + 1] for text in texts)
    choices = options.layers, options.lr, options.steps
    return table(list(second_readings(model.eval(), passage, other, *choices)))
