"""Multi-query key-value recall: which memories find what they were shown once, and how soon."""

from __future__ import annotations

import argparse
from dataclasses import replace

from nested_learning.layers.config import READS
from nested_learning.models.config import HopeConfig
from nested_learning.report import mean, show
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.report import Plot, Report
from nested_learning.reproduce.runner import Result, Run
from nested_learning.reproduce.tasks import SOLVED, RecallRun, recall_model

FIVE = "self_mod, five memories written"
ONE = "self_mod, only M_memory written"
ATTENTION = "attention"


def models(reads: list[str]) -> dict[tuple[str, str], HopeConfig]:
    """The models by name and read."""
    base = recall_model()
    found: dict[tuple[str, str], HopeConfig] = {}
    for name, adaptive in ((FIVE, ("k", "v", "eta", "alpha")), (ONE, ())):
        memory = replace(base.memory, adaptive=adaptive)
        found |= {(name, read): replace(base, read=read, memory=memory) for read in reads}
    return {**found, (ATTENTION, "-"): base.with_mixer("attention")}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Steps, seeds and reads."""
    parser.add_argument("--steps", type=positive, default=1500, help="most updates of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reads", nargs="+", choices=READS, default=["chunk", "after_write", "before_write"])


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per model and read, a run per seed."""
    return {
        f"{name} | {read}": [RecallRun(model=model, steps=options.steps, seed=seed) for seed in options.seeds]
        for (name, read), model in models(options.reads).items()
    }


def report(options: Options, outcome: Outcome) -> Report:
    """Accuracy per seed and its mean, and when it was learned."""
    header = [
        "model",
        "read",
        *(f"seed {seed}" for seed in options.seeds),
        "mean",
        "0.95 at step",
        "stopped at",
    ]
    rows, numbers = [], []
    for label, cells in outcome.items():
        results = [result for _, result in cells]
        accuracies = [result["final"] for result in results]
        accuracy, steps = mean(accuracies), [result["steps"] for result in results]
        solved = [result["solved"] for result in results]
        shown = [show(value, 3) for value in (*accuracies, accuracy)]
        rows.append([*label.split(" | "), *shown, _steps(solved), _steps(steps)])
        model, read = label.split(" | ")
        row = {"model": model, "read": read, "seeds": options.seeds, "accuracy": accuracies, "mean": accuracy}
        rest = {key: [result[key] for result in results] for key in ("nonfinite", "parameters")}
        numbers.append({**row, "solved_at": solved, "steps": steps, **rest})
    return Report(
        title="Multi-query key-value recall",
        header=header,
        rows=rows,
        numbers=numbers,
        notes=_notes(options),
        plot=Plot(lines=_lines(outcome), xlabel="step", ylabel="held-out accuracy"),
    )


def _notes(options: Options) -> list[str]:
    run = RecallRun(steps=options.steps)
    model, optim = run.model, run.optim
    return [
        f"Vocabulary {model.vocab_size}, {run.pairs} pairs, width {model.dim}, {model.num_layers} layers, "
        f"{model.num_heads} heads, chunk {model.chunk_size}, batch {run.batch_size}, "
        f"AdamW {optim.lr:g} with {optim.warmup_steps} steps of warm-up.",
        f"At most {run.steps} steps; a run stops at a held-out accuracy of {run.stop_at}. "
        "Accuracy is on fresh sequences; guessing among the values gives "
        f"{2 / model.vocab_size:.3f}. Evaluated every {run.eval_every} steps; steps are listed per seed.",
        f'"{SOLVED} at step" is the first evaluation with a held-out accuracy of {SOLVED} or more.',
    ]


def _steps(steps: list[int | None]) -> str:
    return ", ".join("-" if step is None else str(step) for step in steps)


def _lines(outcome: Outcome) -> list[tuple[str, list[tuple[float, float | None]]]]:
    def points(result: Result) -> list[tuple[float, float | None]]:
        return [(step, value) for step, value in result["curve"]]

    return [
        (label.replace(" | ", ", read ").removesuffix(", read -"), points(result))
        for label, cells in outcome.items()
        for _, result in cells
    ]


EXPERIMENT = Experiment(
    name="recall",
    help="multi-query key-value recall: self_mod, only M_memory written, attention; all three reads",
    add_options=add_options,
    quick={"steps": 3, "seeds": [0], "reads": ["chunk"]},
    plan=plan,
    report=report,
)
