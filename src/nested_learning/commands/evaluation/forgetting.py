"""What several models learned and forgot, side by side, from results of `nl eval continual`.

uv run nl eval forgetting outputs/hope.json outputs/transformer.json --output outputs/forgetting.png

Each file holds the losses of one model: of its checkpoints, in the order of training, on the same texts.
Models must share a tokenizer. Prints a table, and draws a map per model and the changes beside them.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser
from nested_learning.eval.beside import changes_table, draw_beside, in_words, read_matrices


def parser() -> Parser:
    """The options of `nl eval forgetting`."""
    made, output = Parser(description=__doc__), Path("outputs/eval/forgetting.png")
    made.add_argument("files", nargs="+", type=Path, help="results of nl eval continual, named as the models")
    made.add_argument("--output", type=Path, default=output, help="the picture, .png (default %(default)s)")
    return made


def main() -> None:
    """Print the table and draw the picture."""
    options = parser().parse_args()
    if options.output.suffix != ".png":
        raise ValueError(f"--output must end in .png, got {options.output}")
    matrices = read_matrices(options.files)
    draw_beside(matrices, options.output)
    print(changes_table(matrices), end="")
    for matrix in matrices:
        print(in_words(matrix))
    print(options.output)
