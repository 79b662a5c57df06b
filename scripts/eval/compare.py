"""Several checkpoints, or results of them, in one Markdown table with a column each:

uv run python scripts/eval/compare.py outputs/hope outputs/transformer --length 1024
uv run python scripts/eval/compare.py outputs/hope outputs/transformer --local-dir my_task_files --tasks piqa
uv run python scripts/eval/compare.py outputs/eval/hope-1a2b3c4d outputs/eval/transformer-5e6f7a8b

Checkpoints are evaluated: --length for loss by position, --local-dir for zero-shot tasks. What earlier calls
have scored is not scored again.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser, run_script
from nested_learning.eval.compare import Plan, gather, write
from nested_learning.eval.perplexity import LongTexts
from nested_learning.eval.questions import TASKS
from nested_learning.eval.zeroshot import ZeroShot


def main() -> None:
    """Evaluate what has to be, and print the table."""
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
    options = made.parse_args()
    names, most = (
        tuple(TASKS) if options.tasks == "all" else tuple(options.tasks.split(",")),
        options.max_samples,
    )
    questions = ZeroShot(tasks=names, local_dir=options.local_dir, max_samples=most)
    plan = Plan(
        zeroshot=questions if options.local_dir else None,
        perplexity=LongTexts(files=tuple(options.files), length=options.length, max_samples=most)
        if options.length
        else None,
        device=options.device,
        fresh=options.fresh,
    )
    print(write(gather(options.sources, plan), options.output), end="")
    print(f"\n{options.output}")


if __name__ == "__main__":
    run_script(main)
