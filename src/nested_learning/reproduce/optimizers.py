"""AdamW, Muon and M3, each at its own best learning rate: the bundled text, and handwritten digits.

First every optimizer runs at every learning rate on a seed that is used for nothing else; then at the best
of them on the seeds of the table.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nested_learning.optim.config import OptimConfig
from nested_learning.report import interval
from nested_learning.reproduce.digits import DigitsRun, digits
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, Plan, positive
from nested_learning.reproduce.orthogonal import best_lr
from nested_learning.reproduce.report import Plot, Points, Report
from nested_learning.reproduce.runner import Result, Run
from nested_learning.reproduce.tasks import pilot_run

TUNING_SEED = 100
NAMES = ("adamw", "muon", "m3")
TASKS = ("text", "digits")
LRS = {"text": (1e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2), "digits": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)}
WARMUP = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Tasks, optimizers, rates, steps, seeds."""
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=list(NAMES),
        help='values of optim.name, with other settings of optim behind: "m3 m3.slow_weight=0.2"',
    )
    parser.add_argument("--text-lrs", type=float, nargs="+", default=list(LRS["text"]))
    parser.add_argument("--digits-lrs", type=float, nargs="+", default=list(LRS["digits"]))
    parser.add_argument("--text-steps", type=positive, default=300, help="updates of a run on text")
    parser.add_argument("--digits-steps", type=positive, default=200, help="updates of a run on digits")
    parser.add_argument("--mixer", default="self_mod", help="of the language model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])


def plan(options: Options) -> dict[str, list[Run]]:
    """The search: a row per task and optimizer, a run per learning rate.

    Raises ValueError for an optimizer or a setting that does not exist.
    """
    if "digits" in options.tasks:
        digits()  # says at once if scikit-learn is missing
    rates = {"text": options.text_lrs, "digits": options.digits_lrs}
    return {
        f"{task} | {name}": [make_run(options, task, name, lr, TUNING_SEED) for lr in rates[task]]
        for task in options.tasks
        for name in options.optimizers
    }


def make_run(options: Options, task: str, name: str, lr: float, seed: int) -> Run:
    """One training; everything but optimizer and rate is the same for all of a task."""
    optim = optim_of(name, lr)
    if task == "digits":
        return DigitsRun(optim=optim, steps=options.digits_steps, seed=seed)
    base = pilot_run(options.text_steps, seed)
    model = base.model.with_mixer(options.mixer)
    return replace(base, optim=optim, model=model, eval_every=20, eval_tokens=16_384)


def optim_of(setting: str, lr: float) -> OptimConfig:
    """The optimizer of "name" or "name key=value …".

    Raises ValueError for a key or a value that `OptimConfig` does not have.
    """
    name, *pairs = setting.split()
    base = OptimConfig(name=name, lr=lr, weight_decay=0.1, warmup_steps=WARMUP)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(base), OmegaConf.from_dotlist(pairs))
        found = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"optimizers: {setting!r}: {error}") from error
    assert isinstance(found, OptimConfig)
    return found


def follow_up(options: Options, tuning: Outcome) -> Plan:
    """Every optimizer at its best rate, a run per seed."""
    rows: dict[str, list[Run]] = {}
    for label, cells in tuning.items():
        task, name = label.split(" | ")
        lr = best_lr([run.optim.lr for run, _ in cells], [result for _, result in cells])
        rows[label] = [make_run(options, task, name, lr, seed) for seed in options.seeds]
    return rows


def report(options: Options, outcome: Outcome) -> Report:
    """Final losses with intervals, and how soon each optimizer is where AdamW ends."""
    rows, numbers = [], []
    for label, cells in outcome.items():
        task, name = label.split(" | ")
        targets = _finals(outcome.get(f"{task} | adamw", cells))
        row = _summary(task, name, cells, targets)
        row["lr_at_edge"] = row["lr"] in _edges(options, task)
        row["step_ratio"] = row["step_seconds"] / _step_seconds(outcome.get(f"{task} | adamw", cells))
        numbers.append(row)
        rows.append(_cells(row))
    header = ["task", "optimizer", "learning rate", "validation loss", "test accuracy"]
    header += ["at AdamW's loss after", "of steps", "time of a step"]
    return Report(
        title="AdamW, Muon and M3",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=_notes(options),
        plot=Plot(lines=_lines(outcome), xlabel="step", ylabel="validation loss (nats)", log="y"),
    )


def _finals(cells: list[tuple[Any, Result]]) -> list[float | None]:
    return [result["final"] for _, result in cells]


def _edges(options: Options, task: str) -> tuple[float, float]:
    rates = options.text_lrs if task == "text" else options.digits_lrs
    return min(rates), max(rates)


def _summary(
    task: str, name: str, cells: list[tuple[Any, Result]], targets: list[float | None]
) -> dict[str, Any]:
    """Numbers of a row; `reached`: per seed the first evaluated step at AdamW's final loss of that seed."""
    reached = [reached_at(result, target) for (_, result), target in zip(cells, targets, strict=True)]
    accuracies = [result["accuracy"] for _, result in cells if "accuracy" in result]
    return {
        "task": task,
        "optimizer": name,
        "lr": cells[0][0].optim.lr,
        "seeds": [run.seed for run, _ in cells],
        "final": _finals(cells),
        "accuracy": accuracies,
        "reached": reached,
        "steps": cells[0][0].steps,
        "step_seconds": _step_seconds(cells),
    }


def _step_seconds(cells: list[tuple[Any, Result]]) -> float:
    return float(statistics.median(result["seconds"] / result["steps"] for _, result in cells))


def reached_at(result: Result, target: float | None) -> int | None:
    """The first evaluated step with a loss of at most `target`, or None."""
    if target is None:
        return None
    return next((step for step, loss in result["curve"] if loss is not None and loss <= target), None)


def _cells(row: dict[str, Any]) -> list[str]:
    known = [step for step in row["reached"] if step is not None]
    share = (
        f"{statistics.fmean(known) / row['steps']:.0%}"
        if known and len(known) == len(row["reached"])
        else "-"
    )
    return [
        row["task"],
        row["optimizer"],
        f"{row['lr']:g}" + " (edge)" * row["lr_at_edge"],
        interval(row["final"]),
        interval(row["accuracy"], ".3f") if row["accuracy"] else "-",
        ", ".join(str(step or "never") for step in row["reached"]),
        share,
        f"{row['step_ratio']:.2f} x",
    ]


def _notes(options: Options) -> list[str]:
    text = (
        f"the model of `pilot_smoke` with mixer {options.mixer}, {options.text_steps} steps of 2,048 tokens"
    )
    vit = f"a vision transformer of width 64 and 4 layers, {options.digits_steps} steps of 64 images"
    parts = {"text": f"Text: {text}.", "digits": f"Digits: {vit}."}
    rates = {"text": options.text_lrs, "digits": options.digits_lrs}
    searched = "; ".join(f"{task}: {', '.join(f'{lr:g}' for lr in rates[task])}" for task in options.tasks)
    return [
        *(parts[task] for task in options.tasks),
        f"Mean ± 95 % interval over seeds {options.seeds}. Weight decay 0.1, warm-up {WARMUP} steps, cosine "
        "to a tenth. Beside Muon and M3, AdamW takes embeddings, head, norms and memories at the same rate.",
        f"Learning rate: the lowest final validation loss on seed {TUNING_SEED}, of {searched}.",
        "At AdamW's loss: the first evaluated step, per seed, at the loss AdamW ends with on that seed.",
        "Time of a step: median over the runs of a whole step, validation included, over AdamW's.",
    ]


def _lines(outcome: Outcome) -> list[tuple[str, Points]]:
    return [
        (label.replace(" | ", ", "), [(step, value) for step, value in result["curve"]])
        for label, cells in outcome.items()
        for _, result in cells
    ]


EXPERIMENT = Experiment(
    name="optimizers",
    help="AdamW, Muon and M3 on the bundled text and on digits, each at its own best learning rate",
    add_options=add_options,
    quick={
        "text_steps": 2,
        "digits_steps": 2,
        "text_lrs": [1e-3],
        "digits_lrs": [1e-3],
        "seeds": [0],
        "mixer": "attention",
    },
    plan=plan,
    follow_ups=(follow_up,),
    report=report,
)
