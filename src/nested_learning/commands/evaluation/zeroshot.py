"""Zero-shot accuracy of a checkpoint on multiple-choice tasks, and any task of lm-eval.

uv run nl eval zeroshot --checkpoint outputs/pilot_smoke --tasks piqa,boolq --max-samples 200
uv run nl eval zeroshot --checkpoint outputs/pilot_smoke --local-dir my_task_files
uv run nl eval zeroshot --checkpoint outputs/pilot_smoke --tasks lambada_openai
uv run nl eval zeroshot --list-tasks
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nested_learning.checks import did_you_mean
from nested_learning.command import Parser
from nested_learning.commands.evaluation import options as shared
from nested_learning.eval.arms import Memorize
from nested_learning.eval.evaluation import Evaluation, evaluate
from nested_learning.eval.loading import Loaded
from nested_learning.eval.questions import CHOICES, CONTEXTS, INSTEAD_OF_HUB, TASKS
from nested_learning.eval.results import summarise
from nested_learning.eval.samples import samples_path
from nested_learning.eval.scorer import POLICIES
from nested_learning.eval.zeroshot import ZeroShot, ZeroShotSettings
from nested_learning.hub import check_hub


def parser() -> Parser:
    """The options of `nl eval zeroshot`."""
    made = Parser(description=__doc__)
    shared.add_checkpoint_options(made)
    add = made.add_argument
    add("--tasks", default="all", help="names with commas between them, or all; others are lm-eval's own")
    add("--list-tasks", action="store_true", help="names and fields of the tasks")
    add("--local-dir", type=Path, help="folder with TASK.jsonl, .json or .parquet; default: the hub")
    add("--max-samples", type=int, help="the first so many questions of every task")
    add("--state", choices=POLICIES, default="fresh", help="carried: the questions are one stream of text")
    add("--batch-size", type=int, default=8, help="answers scored together (default 8)")
    shared.add_memorize_options(made)
    return made


def main() -> int:
    """Evaluate and print the table."""
    options = parser().parse_args()
    if options.list_tasks:
        print(list_tasks())
        return 0
    names = shared.tasks_from(options.tasks, tuple(TASKS))
    own = options.local_dir is not None or set(names) <= set(TASKS)
    how = shared.memorize_from(options)
    if how is not None and not own:
        raise ValueError(f"--memorize works with {', '.join(TASKS)} only")
    settings = settings_from(options, names, how) if own else None
    if not own:
        check_tasks(names)
    if options.checkpoint is not None and options.local_dir is None:
        check_hub(INSTEAD_OF_HUB)  # before the weights are read, which takes longer
    loaded = shared.load_from(options)
    evaluation: Evaluation[Any]
    evaluation = ZeroShot(loaded, settings) if settings is not None else harness(options, loaded, names)
    output = loaded.output("zeroshot" if own else "lm_eval", options.output)
    evaluate(evaluation, output, options.fresh)
    print(f"{summarise([output])}\n{output}, samples in {samples_path(output)}")
    return 0


def settings_from(
    options: argparse.Namespace, names: tuple[str, ...], how: Memorize | None
) -> ZeroShotSettings:
    """The settings of the tasks of this package."""
    return ZeroShotSettings(
        tasks=names,
        local_dir=options.local_dir,
        max_samples=options.max_samples,
        batch_size=options.batch_size,
        state=options.state,
        memorize=how,
    )


def check_tasks(names: Sequence[str]) -> None:
    """Refuse names that neither this package nor lm-eval knows, if that is installed.

    Raises:
        ValueError: naming the first of them.
    """
    if find_spec("lm_eval") is None:
        return
    from lm_eval.tasks import TaskManager

    known = [*TASKS, *TaskManager().all_tasks]
    for name in names:
        if name not in known and "*" not in name:
            raise ValueError(f"there is no task {name!r}{did_you_mean(name, known)}; see --list-tasks")


def harness(options: argparse.Namespace, loaded: Loaded, names: tuple[str, ...]) -> Evaluation[None]:
    """The evaluation of tasks of lm-eval."""
    from nested_learning.eval.lm import Harness, HarnessSettings

    scorer = {"batch_size": options.batch_size, "policy": options.state}
    return Harness(loaded, HarnessSettings(tasks=names, limit=options.max_samples, scorer=scorer))


def list_tasks() -> str:
    """The tasks, a line each."""
    lines = [
        f"{name:14} {task.split:11} {', '.join(task.fields)}  ({task.choices or 'several'} choices)"
        for name, task in TASKS.items()
    ]
    others = " or ".join(", ".join(fields) for fields in (CHOICES, CONTEXTS))
    return "\n".join(
        [
            *lines,
            f"records of --local-dir may instead have {others}",
            "any other name is a task of lm-eval (its data from the hub)",
        ]
    )
