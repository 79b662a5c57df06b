"""Time of an optimizer's step on the parameters of a language model, against torch's Muon in the same run."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nested_learning.bench.machine import describe
from nested_learning.bench.timing import Progress, interleave, spread
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.build import build_optimizer
from nested_learning.optim.config import M3Config, OptimConfig
from nested_learning.report import markdown_table

YARDSTICK = "Muon (torch)"
VARIANTS: dict[str, dict[str, Any]] = {
    YARDSTICK: {"name": "muon"},
    "AdamW (torch, fused)": {"name": "adamw"},
    "M3": {"name": "m3"},
    "M3, slow memory off": {"name": "m3", "m3": M3Config(slow_weight=0.0)},
    "M3, no second moment": {"name": "m3", "m3": M3Config(second_moment=False, adjust="match_rms_adamw")},
    "M3, slow memory in every step": {"name": "m3", "m3": M3Config(slow_every=1)},
    "delta momentum": {"name": "delta_momentum"},
    "deep momentum": {"name": "deep_momentum"},
}
"""Fields of `OptimConfig` by the name in the table. Matrices only differ; AdamW takes the rest in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """What is timed.

    Args:
        model: whose parameters are updated.
        steps: updates per timing; a multiple of M3's block, so that each holds its share of slow steps.
        repeats: rounds.
        device: where.
        other: an optimizer from elsewhere to time beside ours, as `file.py:Class`; it gets the 2-D weights of
            the blocks, fused AdamW the rest. other_options: its keyword arguments.
    """

    model: HopeConfig
    steps: int = M3Config().slow_every
    repeats: int = 5
    device: str = "cpu"
    other: str | None = None
    other_options: Mapping[str, Any] = field(default_factory=dict)


def measure(settings: StepSettings, progress: Progress) -> dict[str, Any]:
    """Milliseconds per step of every variant, and their ratios to torch's Muon within each round."""
    runs = {name: _stepper(settings, fields) for name, fields in VARIANTS.items()}
    if settings.other is not None:
        runs[settings.other.rpartition("/")[2]] = _other_stepper(settings)
    seconds = interleave(runs, settings.repeats, settings.device, progress)
    rows = []
    for name, times in seconds.items():
        ratios = spread([a / b for a, b in zip(times, seconds[YARDSTICK], strict=True)])
        rows.append(
            {
                "name": name,
                "ms": 1e3 * spread(times).median / settings.steps,
                "ratio": [ratios.min, ratios.median, ratios.max],
                "seconds": times,
            }
        )
    shapes = _matrix_shapes(HopeLM(settings.model))
    return {"machine": describe(settings.device), "matrices": shapes, "results": rows}


def _stepper(settings: StepSettings, fields: Mapping[str, Any]) -> Callable[[], None]:
    """`settings.steps` updates of a model of its own, with the same random gradients for all."""
    model = _model_with_gradients(settings)
    return _steps([build_optimizer(OptimConfig(lr=1e-5, **fields), model)], settings.steps)


def _other_stepper(settings: StepSettings) -> Callable[[], None]:
    """The same with `settings.other`. Raises ValueError if there is no such file or class."""
    assert settings.other is not None
    path, _, name = settings.other.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"other must be file.py:Class, got {settings.other!r}")
    made = runpy.run_path(path).get(name)
    if made is None:
        raise ValueError(f"{path} has no {name!r}")
    model = _model_with_gradients(settings)
    matrices = _matrices(model)
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    other: Optimizer = made(matrices, lr=1e-5, **settings.other_options)
    return _steps([other, torch.optim.AdamW(rest, lr=1e-5, fused=True)], settings.steps)


def _model_with_gradients(settings: StepSettings) -> HopeLM:
    torch.manual_seed(0)
    model = HopeLM(settings.model).to(settings.device)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return model


def _steps(optimizers: Sequence[Optimizer], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            for optimizer in optimizers:
                optimizer.step()

    return run


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2]


def _matrix_shapes(model: nn.Module) -> dict[str, int]:
    shapes = ["x".join(map(str, p.shape)) for p in _matrices(model)]
    return {shape: shapes.count(shape) for shape in dict.fromkeys(shapes)}


def markdown(result: Mapping[str, Any]) -> str:
    """The table, under a line about the machine."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    matrices = ", ".join(f"{count} of {shape}" for shape, count in result["matrices"].items())
    header = ["optimizer", "ms per step", f"× {YARDSTICK} (min / median / max)"]
    rows = [
        [row["name"], f"{row['ms']:.2f}", " / ".join(f"{value:.2f}" for value in row["ratio"])]
        for row in result["results"]
    ]
    return f"{machine}.\n2-D weights of the blocks: {matrices}.\n\n{markdown_table(header, rows)}"
