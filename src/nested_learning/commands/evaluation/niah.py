r"""RULER's needle-in-a-haystack tasks.

uv run nl eval niah --checkpoint outputs/pilot --context-lengths 2048 4096 8192 \
    --samples-per-length 20 --tasks s1,s2,mk1

Lengths are in tokens of the model's tokenizer, prompt and answer together. Beside the result stand a log of
all samples, from which an interrupted evaluation is resumed, and a map of depths and lengths as PNG.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser
from nested_learning.commands.evaluation import options as shared
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.niah import MAX_NEW_TOKENS, TASKS, Niah


def parser() -> Parser:
    """The options of `nl eval niah`."""
    made = Parser(description=__doc__)
    shared.add_checkpoint_options(made)
    shared.add_grid_options(made, [2048, 4096, 8192], MAX_NEW_TOKENS)
    made.add_argument("--tasks", default=",".join(TASKS), help="with commas between (default %(default)s)")
    made.add_argument("--haystack", type=Path, help="text to cut essays from (default: bundled speeches)")
    shared.add_memorize_options(made)
    return made


def main() -> None:
    """Evaluate and print the table."""
    options = parser().parse_args()
    grid = shared.grid_from(options, options.tasks.split(","))
    loaded = shared.load_from(options)
    output = loaded.output("niah", options.output)
    evaluate(Niah(loaded, grid, options.haystack), output, options.fresh)
    shared.print_result(output)
