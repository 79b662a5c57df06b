"""Loss by position in long texts, and perplexity per token, byte and word.

uv run nl eval long-perplexity --checkpoint outputs/pilot_smoke
uv run nl eval long-perplexity --checkpoint outputs/pilot --files books/*.txt --length 16384

Without --files it reads what training on the bundled texts holds out of them. Beside the result stand a log
of all spans, from which an interrupted evaluation is resumed, and a figure.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser
from nested_learning.commands.evaluation import options as shared
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.perplexity import LongPerplexity, LongTexts
from nested_learning.eval.results import summarise


def parser() -> Parser:
    """The options of `nl eval long-perplexity`."""
    default = LongTexts()
    made = Parser(description=__doc__)
    shared.add_checkpoint_options(made)
    add = made.add_argument
    add("--files", type=Path, nargs="+", default=[], help='.txt, .jsonl with the field "text", folders')
    add("--length", type=int, default=default.length, help="tokens of a span (default %(default)s)")
    add("--max-samples", type=int, default=default.max_samples, help="spans at most (default %(default)s)")
    add("--batch-size", type=int, default=default.batch_size, help="spans together (default %(default)s)")
    shared.add_memorize_options(made)
    return made


def main() -> None:
    """Evaluate and print the table."""
    options = parser().parse_args()
    settings = LongTexts(
        files=tuple(options.files),
        length=options.length,
        max_samples=options.max_samples,
        batch_size=options.batch_size,
        memorize=shared.memorize_from(options),
    )
    loaded = shared.load_from(options)
    output = loaded.output("long_perplexity", options.output)
    evaluate(LongPerplexity(loaded, settings), output, options.fresh)
    print(f"{summarise([output])}\n{output}, picture in {output.with_suffix('.png')}")
