"""Zero-shot accuracy of a checkpoint on multiple-choice tasks:

uv run python scripts/eval/zeroshot.py --checkpoint outputs/pilot_smoke --tasks piqa,boolq --max-samples 200
uv run python scripts/eval/zeroshot.py --checkpoint outputs/pilot_smoke --local-dir my_task_files
uv run python scripts/eval/zeroshot.py --checkpoint outputs/pilot_smoke --tasks lambada_openai
uv run python scripts/eval/zeroshot.py --list-tasks
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nested_learning.command import Parser, run_script
from nested_learning.eval import loading, memorize, zeroshot
from nested_learning.eval.questions import INSTEAD_OF_HUB, TASKS
from nested_learning.eval.results import samples_path, summarise
from nested_learning.hub import check_hub


def main() -> int:
    """Evaluate and print the table."""
    made = Parser(description=__doc__)
    loading.add_options(made)
    zeroshot.add_options(made)
    memorize.add_options(made)
    options = made.parse_args()
    if options.list_tasks:
        print(zeroshot.list_tasks())
        return 0
    names = tuple(TASKS) if options.tasks == "all" else tuple(options.tasks.split(","))
    how = memorize.from_options(options)
    if options.checkpoint is not None and options.local_dir is None:
        check_hub(INSTEAD_OF_HUB)  # before the weights are read, which takes longer
    loaded = loading.from_options(options)
    if options.local_dir is None and not set(names) <= set(TASKS):
        output = harness(options, loaded, names)
    else:
        plan = zeroshot.ZeroShot(
            tasks=names,
            local_dir=options.local_dir,
            max_samples=options.max_samples,
            batch_size=options.batch_size,
            policy=options.state,
            memorize=how,
        )
        output = loaded.output("zeroshot", options.output)
        zeroshot.evaluate_zeroshot(loaded, plan, output, options.fresh)
    print(f"{summarise([output])}\n{output}, samples in {samples_path(output)}")
    return 0


def harness(options: argparse.Namespace, loaded: loading.Loaded, names: tuple[str, ...]) -> Path:
    """Tasks of lm-eval: the result file."""
    from nested_learning.eval.lm import evaluate_harness

    if options.memorize:
        raise ValueError(f"--memorize works with {', '.join(TASKS)} only")
    output, scorer = loaded.output("lm_eval", options.output), {"policy": options.state}
    evaluate_harness(
        loaded, names, output, options.max_samples, options.fresh, batch_size=options.batch_size, **scorer
    )
    return output


if __name__ == "__main__":
    run_script(main)
