r"""What a model forgot: losses of checkpoints on segments of text, backward transfer and forgetting.

uv run nl eval continual --checkpoints after_a after_b after_c after_d \
    --segments-yaml configs/data/continual_segments_sample.yaml --batch-size 4 --max-batches 10

uv run nl eval continual --checkpoints outputs/base outputs/mine --texts novel=bundled:novel.txt mine=my.txt

With as many checkpoints as segments, checkpoint i is the one after learning segment i. Beside the result
stand a log, from which an interrupted evaluation is resumed, and the matrix of losses as PNG.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser
from nested_learning.commands.evaluation import options as shared
from nested_learning.eval import loading
from nested_learning.eval.continual import Continual, ContinualSettings
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.segments import Segments, Windows

DEFAULT_SEGMENTS = Path("configs/data/continual_segments_sample.yaml")


def parser() -> Parser:
    """The options of `nl eval continual`."""
    made, default = Parser(description=__doc__), Windows()
    add = made.add_argument
    help_text = "run folders, checkpoints or exported files, in the order of training"
    add("--checkpoints", "--checkpoint", dest="checkpoints", nargs="+", required=True, help=help_text)
    shared.add_model_options(made)
    add("--segments-yaml", type=Path, default=DEFAULT_SEGMENTS, help="texts (default %(default)s)")
    texts = "texts instead of that file; of each is scored what the first checkpoint's training held out"
    add("--texts", nargs="+", metavar="NAME=FILE", help=texts)
    add("--seq-len", type=int, help="tokens of a window (default: as in training)")
    add("--batch-size", type=int, default=default.batch_size, help="windows at once (default %(default)s)")
    add("--max-batches", type=int, default=default.max_batches, help="per segment (default %(default)s)")
    shared.add_memorize_options(made)
    return made


def main() -> None:
    """Evaluate and print the table."""
    options = parser().parse_args()
    load_options = {
        "config": options.config,
        "tokenizer_path": options.tokenizer_path,
        "device": options.device,
    }
    first = loading.load(options.checkpoints[0], **load_options)
    settings = ContinualSettings(
        checkpoints=options.checkpoints,
        segments=Segments.named(options.texts, first.config.data.valid_fraction)
        if options.texts
        else Segments.read(options.segments_yaml),
        windows=Windows(
            seq_len=options.seq_len, batch_size=options.batch_size, max_batches=options.max_batches
        ),
        load_options=load_options,
        memorize=shared.memorize_from(options),
    )
    output = first.output("continual", options.output)
    evaluate(Continual(first, settings), output, options.fresh)
    shared.print_result(output)
