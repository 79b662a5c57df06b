"""Loss by position in long texts, and perplexity per token, byte and word:

uv run python scripts/eval/long_perplexity.py --checkpoint outputs/pilot_smoke
uv run python scripts/eval/long_perplexity.py --checkpoint outputs/pilot --files books/*.txt --length 16384

Without --files it reads what training on the bundled texts holds out of them. Beside the result: a log of all
spans, from which an interrupted evaluation goes on, and a picture.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser, run_script
from nested_learning.eval import loading, memorize
from nested_learning.eval.perplexity import LongTexts, evaluate_perplexity
from nested_learning.eval.results import summarise


def main() -> None:
    """Evaluate and print the table."""
    default = LongTexts()
    made = Parser(description=__doc__)
    loading.add_options(made)
    add = made.add_argument
    add("--files", type=Path, nargs="+", default=[], help='.txt, .jsonl with the field "text", folders')
    add("--length", type=int, default=default.length, help="tokens of a span (default %(default)s)")
    add("--max-samples", type=int, default=default.max_samples, help="spans at most (default %(default)s)")
    add("--batch-size", type=int, default=default.batch_size, help="spans together (default %(default)s)")
    memorize.add_options(made)
    options = made.parse_args()
    plan = LongTexts(
        files=tuple(options.files),
        length=options.length,
        max_samples=options.max_samples,
        batch_size=options.batch_size,
        memorize=memorize.from_options(options),
    )
    loaded = loading.from_options(options)
    output = loaded.output("long_perplexity", options.output)
    evaluate_perplexity(loaded, plan, output, options.fresh)
    print(f"{summarise([output])}\n{output}, picture in {output.with_suffix('.png')}")


if __name__ == "__main__":
    run_script(main)
