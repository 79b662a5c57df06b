"""What a model forgot: losses of checkpoints on segments of text, backward transfer and forgetting:

uv run python scripts/eval/continual.py --checkpoints after_a after_b after_c after_d \
    --segments-yaml configs/data/continual_segments_sample.yaml --batch-size 4 --max-batches 10

With as many checkpoints as segments, checkpoint i is the one after learning segment i. Beside the result: a
log from which an interrupted evaluation goes on, and the matrix as PNG.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser, run_script
from nested_learning.eval import loading, memorize
from nested_learning.eval.continual import evaluate_continual
from nested_learning.eval.results import samples_path, start_fresh, summarise
from nested_learning.eval.segments import DEFAULT_SEGMENTS, Segments, Windows


def main() -> None:
    """Evaluate and print the table."""
    made = Parser(description=__doc__)
    add = made.add_argument
    help_text = "run folders, checkpoints or exported files, in the order of training"
    add("--checkpoints", "--checkpoint", dest="checkpoints", nargs="+", required=True, help=help_text)
    loading.add_model_options(made)
    default = Windows()
    add("--segments-yaml", type=Path, default=DEFAULT_SEGMENTS, help="texts (default %(default)s)")
    add("--seq-len", type=int, help="tokens of a window (default: as in training)")
    add("--batch-size", type=int, default=default.batch_size, help="windows at once (default %(default)s)")
    add("--max-batches", type=int, default=default.max_batches, help="per segment (default %(default)s)")
    memorize.add_options(made)
    options = made.parse_args()
    windows = Windows(seq_len=options.seq_len, batch_size=options.batch_size, max_batches=options.max_batches)
    learning = memorize.from_options(options)
    segments = Segments.read(options.segments_yaml)
    first = loading.load(options.checkpoints[0], options.config, options.tokenizer_path, options.device)
    output = first.output("continual", options.output)
    if options.fresh:
        start_fresh(samples_path(output))
    model_options = {
        "config": options.config,
        "tokenizer_path": options.tokenizer_path,
        "device": options.device,
    }
    evaluate_continual(options.checkpoints, segments, windows, output, model_options, learning)
    print(summarise([output]), end="")
    print(f"results in {output.parent.resolve()}")


if __name__ == "__main__":
    run_script(main)
