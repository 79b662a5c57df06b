"""A passkey hidden in a long text of filler sentences.

uv run nl eval passkey --checkpoint outputs/pilot --context-lengths 1024 2048 --depths 10

Lengths are in tokens of the model's tokenizer, prompt and answer together. Beside the result stand a log of
all samples, from which an interrupted evaluation is resumed, and a map of depths and lengths as PNG.
"""

from __future__ import annotations

from nested_learning.command import Parser
from nested_learning.commands.evaluation import options as shared
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.passkey import MAX_NEW_TOKENS, TASK, Passkey


def parser() -> Parser:
    """The options of `nl eval passkey`."""
    made = Parser(description=__doc__)
    shared.add_checkpoint_options(made)
    shared.add_grid_options(made, [1024, 2048, 4096], MAX_NEW_TOKENS)
    shared.add_memorize_options(made)
    return made


def main() -> None:
    """Evaluate and print the table."""
    options = parser().parse_args()
    grid = shared.grid_from(options, [TASK])
    loaded = shared.load_from(options)
    output = loaded.output("passkey", options.output)
    evaluate(Passkey(loaded, grid), output, options.fresh)
    shared.print_result(output)
