"""A passkey in a long text that says nothing:

uv run python scripts/eval/passkey.py --checkpoint outputs/pilot --context-lengths 1024 2048 --depths 10

Lengths are in tokens of the model's tokenizer, prompt and answer together. Beside the result: a log of all
samples, from which an interrupted evaluation goes on, and a map of depths and lengths as PNG.
"""

from __future__ import annotations

from nested_learning.command import Parser, run_script
from nested_learning.eval import loading, memorize
from nested_learning.eval.passkey import MAX_NEW_TOKENS, TASK, evaluate_passkey
from nested_learning.eval.results import samples_path, start_fresh, summarise
from nested_learning.eval.retrieval import Grid


def main() -> None:
    """Evaluate and print the table."""
    made = Parser(description=__doc__)
    loading.add_options(made)
    add = made.add_argument
    add("--context-lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    add("--samples-per-length", type=int, default=20, help="passkeys per length (default %(default)s)")
    add("--depths", type=int, default=5, help="places of the passkey, evenly spread (default %(default)s)")
    add(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="room for the answer (default %(default)s)"
    )
    add("--seed", type=int, default=42, help="of the samples (default %(default)s)")
    memorize.add_options(made)
    options = made.parse_args()
    grid = Grid(
        tasks=(TASK,),
        context_lengths=tuple(options.context_lengths),
        samples_per_length=options.samples_per_length,
        depths=options.depths,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
    )
    learning = memorize.from_options(options)
    loaded = loading.from_options(options)
    output = loaded.output("passkey", options.output)
    if options.fresh:
        start_fresh(samples_path(output))
    evaluate_passkey(loaded, grid, output, learning)
    print(summarise([output]), end="")
    print(f"results in {output.parent.resolve()}")


if __name__ == "__main__":
    run_script(main)
