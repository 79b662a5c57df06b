"""New classes task after task, and after each a test on all classes seen so far, without a hint at the task:

uv run python scripts/eval/class_incremental.py --checkpoint outputs/pilot --train clinc150.json --tasks 10
uv run python scripts/eval/class_incremental.py --checkpoint outputs/pilot --train banking77_train.csv \
    --test banking77_test.csv --tasks 7
uv run python scripts/eval/class_incremental.py --checkpoint outputs/pilot --train mine.jsonl --tasks 5

Files hold "text" and "label" (see --label-field). Beside the result: a log from which an interrupted
evaluation goes on, and accuracy over classes as PNG.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser, run_script
from nested_learning.eval import loading, memorize
from nested_learning.eval.class_incremental import METHODS, Protocol, describe, evaluate_class_incremental
from nested_learning.eval.intents import hold_out, read_examples, split_tasks
from nested_learning.eval.results import samples_path, start_fresh, summarise


def main() -> None:
    """Evaluate and print the table."""
    made = Parser(description=__doc__)
    loading.add_options(made)
    add, default = made.add_argument, Protocol()
    add("--train", type=Path, required=True, help="examples (.json, .csv, .jsonl)")
    add("--test", type=Path, help="test examples (default: those in a .json, else every fifth of a class)")
    add("--label-field", help="column of labels (default: label, category or intent)")
    add("--tasks", type=int, default=10, help="(default %(default)s)")
    add("--train-per-class", type=int, help="at most (default: all)")
    add("--test-per-class", type=int, help="at most (default: all)")
    add("--methods", default=",".join(METHODS), help="with commas between (default %(default)s)")
    add("--task-aware", action="store_true", help="candidates are the classes of the text's task only")
    numbers = "lr epochs batch_size replay memory_per_class ewc shrink context_tokens"
    for name in numbers.split():
        value = getattr(default, name)
        add(f"--{name.replace('_', '-')}", type=type(value), default=value, help="(default %(default)s)")
    add("--seed", type=int, default=0, help="of classes, examples and training (default %(default)s)")
    memorize.add_options(made)
    options = made.parse_args()
    fields = {name: getattr(options, name) for name in Protocol.__slots__ if name != "methods"}
    protocol = Protocol(methods=tuple(options.methods.split(",")), **fields)
    train = read_examples(options.train, "train", options.label_field)
    if options.test is None and options.train.suffix != ".json":
        train, test = hold_out(train)
    else:
        test = read_examples(options.test or options.train, "test", options.label_field)
    limits = options.train_per_class, options.test_per_class
    tasks = split_tasks(train, test, options.tasks, options.seed, limits)
    learning = memorize.from_options(options)
    loaded = loading.from_options(options)
    print(", ".join(f"{count} {name}" for name, count in describe(tasks).items()))
    output = loaded.output("class_incremental", options.output)
    if options.fresh:
        start_fresh(samples_path(output))
    evaluate_class_incremental(loaded, tasks, protocol, output, learning)
    print(summarise([output]), end="")
    print(f"results in {output.parent.resolve()}")


if __name__ == "__main__":
    run_script(main)
