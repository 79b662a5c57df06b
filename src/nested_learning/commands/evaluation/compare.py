"""Several checkpoints, or results of them, in one Markdown table with a column each.

uv run nl eval compare outputs/hope outputs/transformer --length 1024
uv run nl eval compare outputs/hope outputs/transformer --local-dir my_task_files --tasks piqa
uv run nl eval compare outputs/eval/hope-1a2b3c4d outputs/eval/transformer-5e6f7a8b

Checkpoints are evaluated: --length for loss by position, --local-dir for zero-shot tasks. What earlier calls
have scored is not scored again.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser
from nested_learning.commands.evaluation.options import tasks_from
from nested_learning.eval.compare import CompareSettings, gather, write
from nested_learning.eval.perplexity import LongTexts
from nested_learning.eval.questions import TASKS
from nested_learning.eval.zeroshot import ZeroShotSettings


def parser() -> Parser:
    """The options of `nl eval compare`."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("sources", nargs="+", help="checkpoints (FOLDER:best too), result files, folders of result files")
    add("--local-dir", type=Path, help="run the zero-shot tasks of this folder")
    add("--tasks", default="all", help="names with commas between them, or all")
    add("--length", type=int, help="run the loss by position in spans of so many tokens")
    add("--files", type=Path, nargs="+", default=[], help="the texts of these spans; default: bundled")
    add("--max-samples", type=int, help="questions per task, and spans, at most")
    add("--fresh", action="store_true", help="score again what earlier calls have scored")
    add("--device", default="cpu", help="auto, cpu, cuda, cuda:0 … or mps (default %(default)s)")
    add("--output", type=Path, default=Path("outputs/eval/comparison.md"), help="the table (%(default)s)")
    return made


def main() -> None:
    """Evaluate checkpoints and print the table."""
    options = parser().parse_args()
    names, most = tasks_from(options.tasks, tuple(TASKS)), options.max_samples
    questions = ZeroShotSettings(tasks=names, local_dir=options.local_dir, max_samples=most)
    texts = None
    if options.length is not None:
        texts = LongTexts(files=tuple(options.files), length=options.length, max_samples=most)
    settings = CompareSettings(
        zeroshot=questions if options.local_dir else None,
        perplexity=texts,
        device=options.device,
        fresh=options.fresh,
    )
    print(write(gather(options.sources, settings), options.output), end="")
    print(f"\n{options.output}")
