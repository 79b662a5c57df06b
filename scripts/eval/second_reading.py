"""What a pretrained Hugging Face model keeps of a text that it has read once (docs/pretrained.md):

uv run python scripts/eval/second_reading.py --model FOLDER --layers 12 6,9,12,15 --lr 0.01 0.1 1000
"""

from __future__ import annotations

from pathlib import Path

import torch

from nested_learning.checks import at_least
from nested_learning.command import Parser, run_script
from nested_learning.data.corpus import bundled_files
from nested_learning.eval.second_reading import second_readings, table

TEXTS = bundled_files()[0].parent
SKIP = 20_000
"""Characters left out at the start of a text: its title and contents."""


def numbers(text: str) -> tuple[int, ...]:
    """`6,9,12` as numbers."""
    return tuple(int(part) for part in text.split(","))


def read(file: Path, length: int) -> str:
    """Enough of a text for `length` tokens, without its title and contents."""
    return file.read_text(encoding="utf-8")[SKIP : SKIP + 8 * length]


def main() -> None:
    """Measure and print the table."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("--model", required=True, help="folder of a Hugging Face model with its tokenizer")
    add(
        "--layers",
        type=numbers,
        nargs="+",
        required=True,
        help="layers that learn, as 6,9,12; several choices",
    )
    add("--lr", type=float, nargs="+", default=[0.1], help="rates (default 0.1)")
    add("--steps", type=int, nargs="+", default=[1], help="steps on a chunk (default 1)")
    add("--length", type=int, default=512, help="tokens of a text (default %(default)s)")
    add("--passage", type=Path, default=TEXTS / "novel.txt", help="what is learned (default %(default)s)")
    add("--other", type=Path, default=TEXTS / "plays.txt", help="what is not (default %(default)s)")
    options = made.parse_args()
    at_least("--length", options.length, 1)
    if not (Path(options.model) / "config.json").is_file():
        raise FileNotFoundError(f"--model {options.model} has no config.json of a Hugging Face model")
    texts = [read(file, options.length) for file in (options.passage, options.other)]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    passage, other = (torch.tensor([tokenizer(text).input_ids]) for text in texts)
    passage, other = passage[:, : options.length + 1], other[:, : options.length + 1]
    choices = options.layers, options.lr, options.steps
    print(table(list(second_readings(model.eval(), passage, other, *choices))))


if __name__ == "__main__":
    run_script(main)
