"""§4.3: tasks whose gradients are orthogonal, one after the other; what does each optimizer undo?

Shapes: K tasks, d inputs, o outputs, rank r per task, N samples; K · r ≤ d.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from nested_learning.optim.deep_momentum import DeepMomentum
from nested_learning.optim.delta_momentum import DeltaMomentum
from nested_learning.optim.m3 import M3
from nested_learning.report import interval, new_figure
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, Plan, positive
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run, Tick
from nested_learning.train.plain_loop import finite_or_none

TASKS, RANK, INPUTS, OUTPUTS, BATCH = 6, 4, 32, 16, 16
TUNING_SEED = 100
Weights = list[nn.Parameter]
MUON: dict[str, Any] = {
    "slow_weight": 0.0,
    "second_moment": False,
    "adjust": "original",
    "ns_dtype": "float32",
}

OPTIMIZERS: dict[str, Callable[[Weights, float], Optimizer]] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "SGD, momentum 0.9": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "Muon": lambda p, lr: M3(p, lr=lr, **MUON),
    "M3": lambda p, lr: M3(p, lr=lr, ns_dtype="float32"),
    "delta momentum": lambda p, lr: DeltaMomentum(p, lr=lr),
    "deep momentum": lambda p, lr: DeepMomentum(p, lr=lr),
}
"""Momentum 0.9 to 0.95 as each has it by default; Muon in float32 so that rounding forgets nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OrthogonalRun:
    """`TASKS` regressions in a row on one matrix W `[o, d]`, one optimizer, its state carried on.

    Task i draws inputs from its own random subspace of rank r; the subspaces are orthogonal, so a gradient
    step on one task leaves the others' losses alone. All forgetting is the optimizer's doing. The
    learning rate falls linearly to 0 within each task: Muon's steps do not shrink by themselves.
    """

    optimizer: str
    lr: float
    seed: int
    steps_per_task: int = 100

    @property
    def steps(self) -> int:
        """Of all tasks together."""
        return TASKS * self.steps_per_task

    def run(self, tick: Tick) -> Result:
        """`losses[i][j]`: of task j after training on task i, over its loss at the start; `final`: the mean
        over tasks at the end, None if not finite."""
        generator = torch.Generator().manual_seed(self.seed)
        bases, target = _problem(generator)
        weight = nn.Parameter(torch.zeros(OUTPUTS, INPUTS))
        optimizer = OPTIMIZERS[self.optimizer]([weight], self.lr)
        start = _losses(weight, bases, target)
        losses = []
        for basis in bases:
            for step in range(self.steps_per_task):
                optimizer.param_groups[0]["lr"] = self.lr * (1 - step / self.steps_per_task)
                x = torch.randn(BATCH, RANK, generator=generator) @ basis.T
                optimizer.zero_grad()
                loss = 0.5 * F.mse_loss(x @ weight.T, x @ target.T, reduction="sum") / BATCH
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            tick(self.steps_per_task)
            losses.append((_losses(weight, bases, target) / start).tolist())
        final = finite_or_none(statistics.fmean(losses[-1]))
        return {"final": final, "losses": [[finite_or_none(v) for v in row] for row in losses]}


def _problem(generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """An orthonormal basis `[d, r]` per task, in a random rotation, and the common target W* `[o, d]`."""
    rotation, _ = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=generator))
    bases = [rotation[:, i * RANK : (i + 1) * RANK] for i in range(TASKS)]
    return bases, torch.randn(OUTPUTS, INPUTS, generator=generator)


@torch.no_grad()
def _losses(weight: Tensor, bases: list[Tensor], target: Tensor) -> Tensor:
    """Expected loss of every task, `[K]`: ½ ‖(W − W*) B‖²."""
    return torch.stack([0.5 * ((weight - target) @ basis).square().sum() for basis in bases])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Steps, rates and seeds."""
    parser.add_argument("--steps-per-task", type=positive, default=100)
    rates = [10**e * m for e in (-4, -3, -2, -1) for m in (1, 2, 5)]
    parser.add_argument("--lrs", type=float, nargs="+", default=rates, help="learning rates to choose from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])


def plan(options: Options) -> dict[str, list[Run]]:
    """The search for learning rates, a row per optimizer, on a seed of its own."""
    return {name: [_run(options, name, lr, TUNING_SEED) for lr in options.lrs] for name in OPTIMIZERS}


def follow_up(options: Options, tuning: Outcome) -> Plan:
    """Every optimizer at its best rate, a run per seed."""
    rows: dict[str, list[Run]] = {}
    for name, cells in tuning.items():
        lr = best_lr([run.lr for run, _ in cells], [result for _, result in cells])
        rows[name] = [_run(options, name, lr, seed) for seed in options.seeds]
    return rows


def _run(options: Options, name: str, lr: float, seed: int) -> OrthogonalRun:
    return OrthogonalRun(optimizer=name, lr=lr, seed=seed, steps_per_task=options.steps_per_task)


def best_lr(rates: Sequence[float], results: Sequence[Result]) -> float:
    """The learning rate of the run with the lowest final loss. Raises ValueError if none is finite."""
    finite = [
        (result["final"], rate)
        for rate, result in zip(rates, results, strict=True)
        if result["final"] is not None
    ]
    if not finite:
        raise ValueError(f"no learning rate of {', '.join(f'{r:g}' for r in rates)} gave a finite loss")
    return min(finite)[1]


def report(options: Options, outcome: Outcome) -> Report:
    """Loss of a task right after it, loss of all tasks at the end, and the difference: forgetting."""
    numbers = [_summary(name, cells) for name, cells in outcome.items()]
    columns = ("learned", "end", "first")
    rows = [
        [
            row["optimizer"],
            f"{row['lr']:g}",
            *(interval(row[key], ".1e") for key in columns),
            f"{row['forgotten']:+.1e}",
        ]
        for row in numbers
    ]
    return Report(
        title="§4.3: orthogonal tasks in a row",
        header=["optimizer", "learning rate", "after its task", "at the end", "first task", "forgotten"],
        rows=rows,
        numbers=numbers,
        notes=_notes(options),
        picture=partial(_draw, {row["optimizer"]: row["matrix"] for row in numbers}),
    )


def _summary(name: str, cells: list[tuple[Any, Result]]) -> dict[str, Any]:
    """Per seed: mean loss after each task's own training, mean loss at the end, the first task's."""
    losses = torch.tensor([result["losses"] for _, result in cells], dtype=torch.float64)  # [seeds, K, K]
    learned = losses.diagonal(dim1=1, dim2=2).mean(1)
    end = losses[:, -1].mean(1)
    return {
        "optimizer": name,
        "lr": cells[0][0].lr,
        "seeds": [run.seed for run, _ in cells],
        "learned": learned.tolist(),
        "end": end.tolist(),
        "first": losses[:, -1, 0].tolist(),
        "forgotten": float((end - learned).mean()),
        "matrix": losses.mean(0).tolist(),
    }


def _notes(options: Options) -> list[str]:
    return [
        f"{TASKS} linear regressions with inputs from orthogonal subspaces of rank {RANK} in {INPUTS} "
        f"dimensions, {OUTPUTS} outputs, {options.steps_per_task} steps of {BATCH} samples each, one after "
        "the other. Losses are over the loss at the start: 0 = learned, 1 = nothing, mean ± 95 % "
        f"interval over {len(options.seeds)} seeds. The learning rate falls linearly to 0 within each task.",
        "A step along the gradient of one task changes no other task's loss, so plain SGD forgets nothing; "
        "what is forgotten is the work of momentum, of rescaling, or of orthogonalisation.",
        "Learning rate: the best loss at the end on a seed of its own, of "
        f"{', '.join(f'{lr:g}' for lr in options.lrs)}.",
    ]


def _draw(matrices: dict[str, list[list[float]]], path: Path) -> None:
    """The forgetting matrices: row = tasks trained so far, column = task whose loss is shown."""
    figure = new_figure(3 * len(matrices), 3.2)
    axes = figure.subplots(1, len(matrices))
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        image = ax.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        ax.set(title=name, xlabel="loss of task", ylabel="after task")
    figure.colorbar(image, ax=list(axes), label="loss over start")
    figure.savefig(path, dpi=100)


EXPERIMENT = Experiment(
    name="orthogonal",
    compiles=False,
    help="§4.3: orthogonal tasks in a row; what every optimizer forgets",
    add_options=add_options,
    quick={"steps_per_task": 1, "lrs": [0.1], "seeds": [0]},
    plan=plan,
    follow_ups=(follow_up,),
    report=report,
)
