"""Bits per byte of a byte-level checkpoint on the held-out documents of its shards.

uv run nl eval held-out --checkpoint outputs/reproduce/byte-bar/runs/NAME/weights.safetensors

Beside the result stands a log of all windows, from which an interrupted evaluation is resumed.
"""

from __future__ import annotations

from nested_learning.command import Parser
from nested_learning.commands.evaluation import options as shared
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.held_out import HeldOut, HeldOutBytes


def parser() -> Parser:
    """The options of `nl eval held-out`."""
    default = HeldOutBytes()
    made = Parser(description=__doc__)
    shared.add_checkpoint_options(made)
    add = made.add_argument
    add("--shards", help="folder of shards, a token per byte (default: that of the checkpoint)")
    add("--length", type=int, default=default.length, help="bytes of a window (default %(default)s)")
    add("--max-samples", type=int, default=default.max_samples, help="windows at most (default %(default)s)")
    add("--batch-size", type=int, default=default.batch_size, help="windows together (default %(default)s)")
    return made


def main() -> None:
    """Evaluate and print the table."""
    options = parser().parse_args()
    settings = HeldOutBytes(
        shards=options.shards,
        length=options.length,
        max_samples=options.max_samples,
        batch_size=options.batch_size,
    )
    loaded = shared.load_from(options)
    output = loaded.output("held_out", options.output)
    evaluate(HeldOut(loaded, settings), output, options.fresh)
    shared.print_result(output)
