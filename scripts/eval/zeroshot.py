"""Zero-shot accuracy of a checkpoint on multiple-choice tasks:

uv run python scripts/eval/zeroshot.py --checkpoint outputs/pilot_smoke --tasks piqa,boolq --max-samples 200
uv run python scripts/eval/zeroshot.py --checkpoint outputs/pilot_smoke --local-dir my_task_files
uv run python scripts/eval/zeroshot.py --checkpoint outputs/pilot_smoke --tasks lambada_openai
uv run python scripts/eval/zeroshot.py --list-tasks
"""

from __future__ import annotations

import argparse
import json

from nested_learning.data.script import run_script
from nested_learning.eval import loading, memorize, zeroshot
from nested_learning.eval.questions import TASKS
from nested_learning.eval.results import samples_path, summarise, write_result


def main() -> int:
    """Evaluate and print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loading.add_options(made)
    zeroshot.add_options(made)
    memorize.add_options(made)
    options = made.parse_args()
    if options.list_tasks:
        print(zeroshot.list_tasks())
        return 0
    names = tuple(TASKS) if options.tasks == "all" else tuple(options.tasks.split(","))
    how = memorize.from_options(options)
    loaded = loading.from_options(options)
    if options.local_dir is None and not set(names) <= set(TASKS):
        return harness(options, loaded, names)
    plan = zeroshot.ZeroShot(
        tasks=names,
        local_dir=options.local_dir,
        max_samples=options.max_samples,
        batch_size=options.batch_size,
        memorize=how,
    )
    output = loaded.output("zeroshot", options.output)
    zeroshot.evaluate_zeroshot(loaded, plan, output, options.fresh)
    print(f"{summarise([output])}\n{output}, samples in {samples_path(output)}")
    return 0


def harness(options: argparse.Namespace, loaded: loading.Loaded, names: tuple[str, ...]) -> int:
    """Tasks of lm-eval beside ours."""
    from nested_learning.eval.lm import evaluate_harness

    if options.memorize:
        raise ValueError(f"--memorize works with {', '.join(TASKS)} only")
    output = loaded.output("lm_eval", options.output)
    cache = output.with_suffix(".cache")
    result, samples = evaluate_harness(
        loaded, names, options.max_samples, cache, batch_size=options.batch_size
    )
    write_result(output, result)
    lines = [json.dumps(row, default=str) for rows in samples.values() for row in rows]
    samples_path(output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{summarise([output])}\n{output}, samples in {samples_path(output)}")
    return 0


if __name__ == "__main__":
    run_script(main)
