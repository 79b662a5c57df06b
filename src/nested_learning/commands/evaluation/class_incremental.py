r"""New classes task by task, and after each task a test on all classes seen so far.

uv run nl eval class-incremental --checkpoint outputs/pilot --train clinc150.json --tasks 10
uv run nl eval class-incremental --checkpoint outputs/pilot --train banking77_train.csv \
    --test banking77_test.csv --tasks 7
uv run nl eval class-incremental --checkpoint outputs/pilot --train mine.jsonl --tasks 5

Files hold "text" and "label" (see --label-field). Beside the result stand a log, from which an interrupted
evaluation is resumed, and accuracy over classes as PNG.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from nested_learning.command import Parser
from nested_learning.commands.evaluation import options as shared
from nested_learning.eval.class_incremental import (
    METHODS,
    ClassIncremental,
    ClassIncrementalSettings,
    describe,
)
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.intents import ClassTask, hold_out, read_examples, split_tasks

NUMBERS = ("lr", "epochs", "batch_size", "replay", "memory_per_class", "ewc", "shrink", "context_tokens")
"""Fields of the settings that are options as they are."""


def parser() -> Parser:
    """The options of `nl eval class-incremental`."""
    made = Parser(description=__doc__)
    shared.add_checkpoint_options(made)
    add, default = made.add_argument, ClassIncrementalSettings()
    add("--train", type=Path, required=True, help="examples (.json, .csv, .jsonl)")
    add("--test", type=Path, help="test examples (default: those in a .json, else every fifth of a class)")
    add("--label-field", help="column of labels (default: label, category or intent)")
    add("--tasks", type=int, default=10, help="(default %(default)s)")
    add("--train-per-class", type=int, help="at most (default: all)")
    add("--test-per-class", type=int, help="at most (default: all)")
    add("--methods", default=",".join(METHODS), help="with commas between (default %(default)s)")
    add("--task-aware", action="store_true", help="candidates are the classes of the text's task only")
    for name in NUMBERS:
        value = getattr(default, name)
        add(f"--{name.replace('_', '-')}", type=type(value), default=value, help="(default %(default)s)")
    add("--seed", type=int, default=0, help="of classes, examples and training (default %(default)s)")
    shared.add_memorize_options(made)
    return made


def main() -> None:
    """Evaluate and print the table."""
    options = parser().parse_args()
    settings = settings_from(options)
    tasks = read_tasks(options)
    loaded = shared.load_from(options)
    evaluation = ClassIncremental(loaded, tasks, settings)
    print(", ".join(f"{count} {name}" for name, count in describe(tasks).items()))
    output = loaded.output("class_incremental", options.output)
    evaluate(evaluation, output, options.fresh)
    shared.print_result(output)


def settings_from(options: argparse.Namespace) -> ClassIncrementalSettings:
    """The settings that the options describe."""
    given = {field.name for field in fields(ClassIncrementalSettings)} - {"methods", "memorize"}
    return ClassIncrementalSettings(
        methods=tuple(options.methods.split(",")),
        memorize=shared.memorize_from(options),
        **{name: getattr(options, name) for name in given},
    )


def read_tasks(options: argparse.Namespace) -> list[ClassTask]:
    """The tasks of the files that the options name."""
    train = read_examples(options.train, "train", options.label_field)
    if options.test is None and options.train.suffix != ".json":
        train, test = hold_out(train)
    else:
        test = read_examples(options.test or options.train, "test", options.label_field)
    limits = options.train_per_class, options.test_per_class
    return split_tasks(train, test, options.tasks, options.seed, limits)
