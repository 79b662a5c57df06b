"""RULER's needle-in-a-haystack tasks:

uv run python scripts/eval/niah.py --checkpoint outputs/pilot --context-lengths 2048 4096 8192 \
    --samples-per-length 20 --tasks s1,s2,mk1

Lengths are in tokens of the model's tokenizer, prompt and answer together. Beside the result: a log of all
samples, from which an interrupted evaluation goes on, and a map of depths and lengths as PNG.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser, run_script
from nested_learning.eval import loading, memorize
from nested_learning.eval.haystack import TASKS
from nested_learning.eval.niah import MAX_NEW_TOKENS, evaluate_niah
from nested_learning.eval.results import samples_path, start_fresh, summarise
from nested_learning.eval.retrieval import Grid


def main() -> None:
    """Evaluate and print the table."""
    made = Parser(description=__doc__)
    loading.add_options(made)
    add = made.add_argument
    add("--context-lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    add("--samples-per-length", type=int, default=20, help="of every task (default %(default)s)")
    add("--tasks", default=",".join(TASKS), help="with commas between (default %(default)s)")
    add("--depths", type=int, default=5, help="places of the needle, evenly spread (default %(default)s)")
    add("--haystack", type=Path, help="text to cut essays from (default: bundled speeches)")
    add(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="room for the answer (default %(default)s)"
    )
    add("--seed", type=int, default=42, help="of the samples (default %(default)s)")
    memorize.add_options(made)
    options = made.parse_args()
    grid = Grid(
        tasks=tuple(options.tasks.split(",")),
        context_lengths=tuple(options.context_lengths),
        samples_per_length=options.samples_per_length,
        depths=options.depths,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
    )
    learning = memorize.from_options(options)
    loaded = loading.from_options(options)
    output = loaded.output("niah", options.output)
    if options.fresh:
        start_fresh(samples_path(output))
    evaluate_niah(loaded, grid, output, options.haystack, learning)
    print(summarise([output]), end="")
    print(f"results in {output.parent.resolve()}")


if __name__ == "__main__":
    run_script(main)
