"""Time of an optimizer's step on the parameters of a language model, against torch's Muon in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nested_learning.bench.machine import describe
from nested_learning.bench.timing import Progress, interleave, spread
from nested_learning.config import OptimConfig
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.optim.build import build_optimizer
from nested_learning.optim.config import M3Config

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
    """

    model: HopeConfig
    steps: int = M3Config().slow_every
    repeats: int = 5
    device: str = "cpu"


def measure(settings: StepSettings, progress: Progress) -> dict[str, Any]:
    """Milliseconds per step of every variant, and their ratios to torch's Muon within each round."""
    runs = {name: _stepper(settings, fields) for name, fields in VARIANTS.items()}
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
    torch.manual_seed(0)
    model = HopeLM(settings.model).to(settings.device)
    optimizer: Optimizer = build_optimizer(OptimConfig(lr=1e-5, **fields), model)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)

    def run() -> None:
        for _ in range(settings.steps):
            optimizer.step()

    return run


def _matrix_shapes(model: nn.Module) -> dict[str, int]:
    shapes = [
        "x".join(map(str, p.shape))
        for n, p in model.named_parameters()
        if n.startswith("blocks") and p.ndim == 2
    ]
    return {shape: shapes.count(shape) for shape in dict.fromkeys(shapes)}


def markdown(result: Mapping[str, Any]) -> str:
    """The table, under a line about the machine."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    matrices = ", ".join(f"{count} of {shape}" for shape, count in result["matrices"].items())
    lines = [f"{machine}.", f"2-D weights of the blocks: {matrices}.", ""]
    lines += [f"| optimizer | ms per step | × {YARDSTICK} (min / median / max) |", "|---|---|---|"]
    for row in result["results"]:
        ratio = " / ".join(f"{value:.2f}" for value in row["ratio"])
        lines.append(f"| {row['name']} | {row['ms']:.2f} | {ratio} |")
    return "\n".join(lines) + "\n"
