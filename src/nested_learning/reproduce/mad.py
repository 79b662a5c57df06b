"""The MAD suite, after Table 4 of the paper: six small tasks, models of equal size.

The tasks are in `data.synthetic.mad`. Every model has one learning rate for all of them, chosen by its mean
accuracy on some of them (`reproduce.tuning`).

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.config import load_config
from nested_learning.data.synthetic.mad import TASKS
from nested_learning.layers.config import READS
from nested_learning.layers.norm import RMSNorm
from nested_learning.models.bill import count_parameters
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.report import interval, mean, new_figure
from nested_learning.reproduce import tuning
from nested_learning.reproduce.contenders import CONTENDERS, build_row, row_label, same_size, state_size
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, Plan, positive
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run
from nested_learning.reproduce.tasks import AnswerRun, recall_optim
from nested_learning.reproduce.texts import with_sizes
from nested_learning.reproduce.tuning import Cells, Runs
from nested_learning.train.plain_loop import Batch

ROWS = ("hope", "titans", "gated_delta", "transformer", "transformer_conv")
COMPRESSION = "compression"


class Compressor(nn.Module):
    """An autoencoder: all that a decoder sees of a sequence is what a model holds at its last token.

    The head of the language model is a D × D projection here. The decoder is an MLP with an output layer of
    its own for every position. The suite's has one output layer and adds the position to what it sees; so it
    knew no more than which tokens there were after hundreds of steps.

    Args:
        length: tokens of every sequence.
    """

    def __init__(self, config: HopeConfig, length: int) -> None:
        super().__init__()
        self.encoder = HopeLM(replace(config, tie_embeddings=False))
        dim = config.dim
        self.encoder.head = nn.Linear(dim, dim, bias=False)
        self.decoder = nn.Sequential(
            RMSNorm(dim, config.norm_eps),
            nn.Linear(dim, dim),
            nn.GELU(),
            RMSNorm(dim, config.norm_eps),
            nn.Linear(dim, length * config.vocab_size),
            nn.Unflatten(-1, (length, config.vocab_size)),
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """`tokens [B, T]` → (`logits [B, T, V]` for the tokens themselves, None)."""
        logits: Tensor = self.decoder(self.encoder(tokens)[0][:, -1])
        return logits, None


@dataclass(frozen=True, kw_only=True, slots=True)
class MadRun(AnswerRun):
    """One training on a task of the suite.

    Args:
        task: name in `TASKS`; the model has its vocabulary.
    """

    task: str

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """`size` sequences of the task."""
        task = TASKS[self.task]
        return task.draw(size, generator, task.settings)

    def build(self) -> nn.Module:
        """The model, for compression as the encoder of an autoencoder."""
        if self.task == COMPRESSION:
            return Compressor(self.model, TASKS[self.task].settings.length)
        return HopeLM(self.model)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Models, tasks, rates, sizes, steps and seeds."""
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    rates = "tasks that choose a model's learning rate, as far as they are in the table"
    add("--tune-on", nargs="+", choices=list(TASKS), default=["recall", "copying"], help=rates)
    add("--dim", type=positive, default=32, help="model width")
    add("--steps", type=positive, default=400, help="most updates of a run")
    add_answer_options(parser, ROWS)


def add_answer_options(parser: argparse.ArgumentParser, rows: tuple[str, ...]) -> None:
    """Models, rates, sizes and seeds of a table of accuracies."""
    add = parser.add_argument
    more = 'with options of the model behind: "hope read=chunk"'
    add("--models", nargs="+", default=list(rows), help=f"of {', '.join(CONTENDERS)}; {more}")
    add("--lrs", type=float, nargs="+", default=[3e-3, 6e-3, 1.2e-2], help="learning rates to choose from")
    add("--layers", type=positive, default=2, help="blocks")
    add("--heads", type=positive, default=2, help="heads of every mixer")
    add("--chunk", type=positive, default=16, help="tokens between two writes of a memory")
    add("--read", choices=READS, default="after_write", help="which weights of a memory a token reads")
    add("--batch", type=positive, default=32, help="sequences per step")
    add("--eval-batches", type=positive, default=2, help="batches (of 4 x --batch) of an evaluation")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])


@cache
def sized_model(
    row: str, dim: int, vocab_size: int, layers: int, heads: int, chunk: int, read: str
) -> HopeConfig:
    """The model of a row, with as many parameters as HOPE has at these sizes.

    Raises ValueError for a row or a size that cannot be.
    """
    sizes = argparse.Namespace(dim=dim, layers=layers, heads=heads, chunk=chunk)
    base = replace(with_sizes(load_config("pilot_smoke").model, sizes, vocab_size), read=read)
    return same_size(build_row(row, base), count_parameters(base))


def shared_sizes(options: Options) -> dict[str, Any]:
    """The sizes of `add_answer_options`, for `sized_model`."""
    return {name: getattr(options, name) for name in ("layers", "heads", "chunk", "read")}


def _runs(options: Options, tasks: list[str]) -> Runs:
    def runs(row: str, lr: float, seed: int) -> list[Run]:
        return [
            MadRun(
                task=task,
                model=sized_model(row, options.dim, TASKS[task].settings.vocab_size, **shared_sizes(options)),
                optim=replace(recall_optim(), lr=lr),
                steps=options.steps,
                seed=seed,
                batch_size=options.batch,
                eval_every=max(1, options.steps // 16),
                eval_batches=options.eval_batches,
            )
            for task in tasks
        ]

    return runs


def _tune_on(options: Options) -> list[str]:
    return [task for task in options.tasks if task in options.tune_on] or options.tasks[:1]


def slowness(run: Any, result: Result) -> float:
    """Share of wrong answers to two digits; of equal ones, that with fewer steps is lower."""
    accuracy: float = result["final"]
    part: float = result["steps"] / run.steps
    return round(1 - accuracy, 2) + 0.005 * part


def plan(options: Options) -> Plan:
    """The search: a row per model, runs of some tasks per learning rate."""
    if len(options.lrs) == 1:
        runs = _runs(options, options.tasks)
        return tuning.at_one_rate(options.models, options.lrs[0], runs, options.seeds)
    return tuning.search(options.models, options.lrs, _runs(options, _tune_on(options)))


def widen(options: Options, outcome: Outcome) -> Plan:
    """One more learning rate for every model whose best is at the edge of its grid."""
    return tuning.widen(outcome, _runs(options, _tune_on(options)), slowness)


def final(options: Options, outcome: Outcome) -> Plan:
    """Every model on every task at its best rate, a run per seed."""
    return tuning.final(outcome, _runs(options, options.tasks), options.seeds, slowness)


def report(options: Options, outcome: Outcome) -> Report:
    """Accuracy on every task, and the mean over them."""
    searched, finals = tuning.searched(outcome), tuning.final_outcome(outcome)
    numbers = [_numbers(options, row, cells, searched[row]) for row, cells in finals.items()]
    header = ["model", "parameters", "state", "learning rate", "average"]
    return Report(
        title="MAD",
        header=[*header, *(TASKS[task].label for task in options.tasks)],
        rows=[_cells(options, row) for row in numbers],
        numbers=numbers,
        notes=_notes(options, outcome),
        picture=partial(_draw, options, numbers),
    )


def _numbers(options: Options, row: str, cells: Cells, searched: Cells) -> dict[str, Any]:
    by_task = {task: [result for run, result in cells if run.task == task] for task in options.tasks}
    accuracy = {task: [result["final"] for result in results] for task, results in by_task.items()}
    first = next(run for run, _ in cells if run.task == options.tasks[0])
    rate = first.optim.lr
    return {
        "model": row_label(row),
        "parameters": by_task[options.tasks[0]][0]["parameters"],
        "state": state_size(first.model, TASKS[first.task].settings.length),
        "lr": rate,
        "lrs": tuning.rates_of(searched),
        "lr_at_edge": tuning.at_edge(searched, rate),
        "seeds": options.seeds,
        "average": [mean(list(values)) for values in zip(*accuracy.values(), strict=True)],
        "accuracy": accuracy,
        "solved_at": {task: [result["solved"] for result in results] for task, results in by_task.items()},
        "steps": {task: [result["steps"] for result in results] for task, results in by_task.items()},
        "step_seconds": mean([result["step_seconds"] for _, result in cells]),
        "seconds": sum(result["seconds"] for _, result in cells),
        "nonfinite": sum(result["nonfinite"] for _, result in cells),
    }


def _cells(options: Options, row: dict[str, Any]) -> list[str]:
    rate = f"{row['lr']:g}" + " (edge)" * row["lr_at_edge"]
    known = [row["model"], f"{row['parameters']:,}", f"{row['state']:,}", rate]
    return [*known, percent(row["average"]), *(percent(row["accuracy"][task]) for task in options.tasks)]


def percent(accuracies: list[float]) -> str:
    """Mean and interval of shares, in percent."""
    return interval([100 * accuracy for accuracy in accuracies], ".1f")


def _notes(options: Options, outcome: Outcome) -> list[str]:
    spent = sum(result["seconds"] for cells in outcome.values() for _, result in cells)
    tuned = ", ".join(TASKS[task].label for task in _tune_on(options))
    sizes = "; ".join(
        f"{task.label}: vocabulary {task.settings.vocab_size}, {task.settings.length} tokens, guessing "
        f"{100 * task.chance:.1f}"
        for task in (TASKS[name] for name in options.tasks)
    )
    return [
        f"Percent of answers that are right, on fresh sequences; mean over seeds {options.seeds} with its "
        f"95 % interval. {sizes}.",
        f"At most {options.steps} steps of {options.batch} sequences; a run stops at a held-out accuracy of "
        f"0.99. {shared_notes(options)} {tuning.how_chosen(options.lrs, f' by the mean of {tuned}')}",
        "Parameters and state are those on the first task; all models have the same decoder for compression, "
        "which sees nothing but their last output.",
        f"{spent / 60:.0f} minutes of runs in all, on {options.device}.",
    ]


def shared_notes(options: Options) -> str:
    """What the options of `add_answer_options` say of all models."""
    return (
        f"{options.layers} layers, {options.heads} heads; memories are written every {options.chunk} tokens "
        f"and read {options.read}; MLPs as wide as equal parameters ask for. AdamW with a warm-up."
    )


def _draw(options: Options, numbers: list[dict[str, Any]], path: Path) -> None:
    """Bars of every model by task, and the average first; a whisker spans the seeds."""
    names = ["average", *(TASKS[task].label for task in options.tasks)]
    figure = new_figure(2 + 1.4 * len(names), 4)
    axes = figure.add_subplot()
    width = 0.8 / len(numbers)
    for i, row in enumerate(numbers):
        seeds = [row["average"], *(row["accuracy"][task] for task in options.tasks)]
        means = [100 * sum(values) / len(values) for values in seeds]
        low = [m - 100 * min(values) for m, values in zip(means, seeds, strict=True)]
        high = [100 * max(values) - m for m, values in zip(means, seeds, strict=True)]
        at = [x + (i - (len(numbers) - 1) / 2) * width for x in range(len(names))]
        axes.bar(at, means, width, yerr=[low, high], label=row["model"], error_kw={"linewidth": 0.8})
    for x, task in enumerate(options.tasks, start=1):
        axes.hlines(100 * TASKS[task].chance, x - 0.4, x + 0.4, colors="black", linestyles="dotted")
    axes.set_xticks(range(len(names)), names, size="small")
    axes.set_ylabel("answers that are right (%)")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


EXPERIMENT = Experiment(
    name="mad",
    help="the six tasks of the MAD suite: HOPE, Titans, the gated delta rule, Transformers of one size",
    add_options=add_options,
    quick={
        "steps": 1,
        "seeds": [0],
        "lrs": [6e-3],
        "tasks": ["recall", "copying", "compression"],
        "tune_on": ["recall"],
        "models": ["hope", "transformer"],
        "dim": 16,
        "layers": 1,
        "batch": 2,
        "eval_batches": 1,
    },
    plan=plan,
    report=report,
    follow_ups=(widen, widen, final),
)
