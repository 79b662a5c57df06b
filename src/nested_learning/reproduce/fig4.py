"""Fig. 4: momentum and delta momentum in a curved valley, and over a grid of its constants.

ψ(r, θ) = r² + k (r − θ + a sin ωr)², from (−3.5, 2). The paper gives neither constants nor rates.
Shapes: S settings; a point or gradient is `[S, 1, 2]`, one row per setting, as delta momentum wants it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nested_learning.optim.config import DeltaMomentumConfig
from nested_learning.optim.delta_momentum import forget
from nested_learning.report import new_figure
from nested_learning.reproduce.experiment import Experiment, Options, Outcome, positive
from nested_learning.reproduce.report import Report
from nested_learning.reproduce.runner import Result, Run, Tick

START = (-3.5, 2.0)
SOLVED = 1e-6  # ψ below this …
IN_A_ROW = 10  # … in so many steps, of which the first counts
GRID: dict[str, tuple[float, ...]] = {
    "k": (1, 3, 10),
    "omega": (1, 2, 5),
    "a": (0.5, 1),
    "lr": (0.001, 0.004, 0.01),
    "momentum": (0.8, 0.9, 0.95),
}
REFERENCE = {"k": 10.0, "omega": 2.0, "a": 1.0, "lr": 0.004, "momentum": 0.9}
STANDARD = "momentum"
METHODS: dict[str, dict[str, str]] = {
    STANDARD: {"delta": "off"},
    "delta, capped": {"delta": "capped"},
    "delta, normalized": {"delta": "normalized"},
    "delta, coefficient η": {"delta": "eta"},
    "delta, as printed": {"delta": "literal"},
    "delta, as printed, ggᵀ": {"delta": "literal", "side": "left"},
}


def valley(point: Tensor, k: Tensor, omega: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """ψ `[S]` and its gradient `[S, 1, 2]` at `point [S, 1, 2]`; constants `[S]`."""
    r, theta = point[:, 0, 0], point[:, 0, 1]
    off = r - theta + a * torch.sin(omega * r)
    slope = 1 + a * omega * torch.cos(omega * r)
    gradient = torch.stack([2 * r + 2 * k * off * slope, -2 * k * off], -1)
    return r**2 + k * off**2, gradient[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ValleyRun:
    """One method in all settings at once, float64. `options`: of `DeltaMomentumConfig`."""

    options: dict[str, str]
    settings: tuple[dict[str, float], ...]
    steps: int = 20_000

    def run(self, tick: Tick) -> Result:
        """Per setting: `solved` (step, or None), `diverged` (step, or None), `overshoot` (largest r, beyond
        the minimum at 0); and the `path` of the first setting."""
        track = _Track(len(self.settings))
        constants = {name: torch.tensor([s[name] for s in self.settings]).double() for name in GRID}
        point = torch.tensor(START).double().repeat(len(self.settings), 1, 1)
        momentum = torch.zeros_like(point)
        lr, alpha = (constants[name][:, None, None] for name in ("lr", "momentum"))
        group: dict[str, Any] = asdict(DeltaMomentumConfig(**self.options)) | {"lr": lr, "momentum": alpha}  # type: ignore[arg-type]
        terrain = {name: constants[name] for name in ("k", "omega", "a")}
        _, gradient = valley(point, **terrain)
        for step in range(1, self.steps + 1):
            forget(momentum, gradient, group)
            momentum -= lr * gradient
            point += momentum
            height, gradient = valley(point, **terrain)
            if track.see(step, point, height):
                break
        tick(self.steps)
        return track.result()


class _Track:
    """What happened in every setting."""

    def __init__(self, count: int) -> None:
        self.streak = torch.zeros(count, dtype=torch.int64)
        self.solved = torch.zeros(count, dtype=torch.int64)
        self.diverged = torch.zeros(count, dtype=torch.int64)
        self.overshoot = torch.zeros(count, dtype=torch.float64)
        self.path = [list(START)]

    def see(self, step: int, point: Tensor, height: Tensor) -> bool:
        """Take note of a step; whether all settings are over. A point that has left is put back to 0."""
        is_over = (self.solved > 0) | (self.diverged > 0)
        left = ~(point.abs().amax((1, 2)) < 1e6) & ~is_over
        self.diverged[left] = step
        point[left | (self.diverged > 0)] = 0.0
        self.streak = torch.where(height < SOLVED, self.streak + 1, 0)
        new = (self.streak == IN_A_ROW) & ~is_over & ~left
        self.solved[new] = step - IN_A_ROW + 1
        self.overshoot = torch.where(is_over | left, self.overshoot, self.overshoot.maximum(point[:, 0, 0]))
        if not is_over[0] and not left[0]:
            self.path.append(point[0, 0].tolist())
        return bool(((self.solved > 0) | (self.diverged > 0)).all())

    def result(self) -> Result:
        """As JSON can hold it."""
        return {
            "solved": [int(s) or None for s in self.solved],
            "diverged": [int(s) or None for s in self.diverged],
            "overshoot": self.overshoot.tolist(),
            "path": self.path,
        }


def grid() -> tuple[dict[str, float], ...]:
    """The reference setting, then every combination of the grid."""
    rows = [dict(zip(GRID, map(float, values), strict=True)) for values in itertools.product(*GRID.values())]
    return (REFERENCE, *rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Steps."""
    parser.add_argument("--steps", type=positive, default=20_000, help="most steps of a descent")


def plan(options: Options) -> dict[str, list[Run]]:
    """A row per method."""
    settings = grid()
    return {
        name: [ValleyRun(options=chosen, settings=settings, steps=options.steps)]
        for name, chosen in METHODS.items()
    }


def report(options: Options, outcome: Outcome) -> Report:
    """The reference setting, then the grid: solved, faster than plain momentum, less overshoot."""
    results = {name: cells[0][1] for name, cells in outcome.items()}
    numbers = [_compare(name, result, results[STANDARD]) for name, result in results.items()]
    header = ["method", "steps", "overshoot", "diverged", "solved", "faster", "steps ratio"]
    header += ["less overshoot", "overshoot ratio"]
    return Report(
        title="Fig. 4: momentum in a curved valley",
        header=header,
        rows=[_cells(row) for row in numbers],
        numbers=numbers,
        notes=_notes(options),
        picture=partial(_draw, {_label(name, result): result["path"] for name, result in results.items()}),
    )


def _label(name: str, result: Result) -> str:
    solved, diverged = result["solved"][0], result["diverged"][0]
    return f"{name} ({f'{solved} steps' if solved else 'diverges' if diverged else 'too slow'})"


def _compare(name: str, result: Result, standard: Result) -> dict[str, Any]:
    """Numbers of a method over the grid, without the reference setting, which comes first."""
    pairs = list(zip(result["solved"][1:], standard["solved"][1:], strict=True))
    both = [i for i, (mine, theirs) in enumerate(pairs) if mine and theirs]
    ratios = [pairs[i][0] / pairs[i][1] for i in both]
    over = [(result["overshoot"][i + 1], standard["overshoot"][i + 1]) for i in both]
    shares = [mine / theirs for mine, theirs in over if theirs > 0]
    return {
        "method": name,
        "reference_steps": result["solved"][0],
        "reference_overshoot": result["overshoot"][0] if result["solved"][0] else None,
        "reference_diverged": result["diverged"][0],
        "settings": len(pairs),
        "solved": sum(mine is not None for mine, _ in pairs),
        "compared": len(both),
        "faster": sum(ratio < 1 for ratio in ratios),
        "steps_ratio": statistics.median(ratios) if ratios else None,
        "less_overshoot": sum(mine < theirs for mine, theirs in over),
        "overshoot_ratio": statistics.median(shares) if shares else None,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    def number(key: str, digits: int = 2) -> str:
        return "-" if row[key] is None else f"{row[key]:.{digits}f}"

    diverged = "-" if row["reference_diverged"] is None else f"step {row['reference_diverged']}"
    of = f" of {row['compared']}"
    return [
        row["method"],
        number("reference_steps", 0),
        number("reference_overshoot"),
        diverged,
        f"{row['solved']} of {row['settings']}",
        f"{row['faster']}{of}",
        number("steps_ratio"),
        f"{row['less_overshoot']}{of}",
        number("overshoot_ratio"),
    ]


def _notes(options: Options) -> list[str]:
    constants = ", ".join(f"{name} = {value:g}" for name, value in REFERENCE.items())
    ranges = "; ".join(f"{name} {', '.join(f'{v:g}' for v in values)}" for name, values in GRID.items())
    return [
        f"ψ = r² + k (r − θ + a sin ωr)² from {START}. Steps, overshoot and divergence at {constants}; "
        f"the other columns over {math.prod(len(v) for v in GRID.values())} settings ({ranges}).",
        f"Steps: the first of {IN_A_ROW} in a row with ψ < {SOLVED:g}, within {options.steps}. Overshoot: "
        "the largest r, beyond the minimum at 0. Comparisons are with plain momentum where both get there; "
        "ratios are medians, below 1 in favour of delta momentum.",
    ]


def _draw(paths: dict[str, list[list[float]]], path: Path) -> None:
    """Contours of ψ at the reference setting, and the paths that stay inside."""
    axis = torch.linspace(-4.5, 4.5, 200, dtype=torch.float64)
    r, theta = torch.meshgrid(axis, axis, indexing="xy")
    points = torch.stack([r.reshape(-1), theta.reshape(-1)], -1)[:, None]
    terrain = {name: torch.tensor(REFERENCE[name], dtype=torch.float64) for name in ("k", "omega", "a")}
    height, _ = valley(points, **terrain)
    figure = new_figure(8, 6)
    axes = figure.add_subplot()
    axes.contourf(axis, axis, (1 + height).log10().view_as(r), 30, cmap="Greys")
    for label, steps in paths.items():
        xs, ys = zip(*steps, strict=True)
        axes.plot(xs, ys, label=label, linewidth=1)
    axes.plot(0, 0, "*", color="black")
    axes.set(xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), xlabel="r", ylabel="θ")
    axes.legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=120)


EXPERIMENT = Experiment(
    name="fig4",
    compiles=False,
    help="Fig. 4: momentum and delta momentum in a curved valley, at one setting and over a grid",
    add_options=add_options,
    quick={"steps": 5},
    plan=plan,
    report=report,
)
