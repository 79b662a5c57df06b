"""The smallest nested model: three levels in a row, each to be updated at its own frequency.

Shapes: B batch, T time, D input width, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.layers.checks import describe

Criterion = Callable[[Tensor, Tensor], Tensor]


class RecurrentLevel(nn.Module):
    """An LSTM as wide as its input: `[B, T, D]` → `[B, T, D]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states, from an empty memory at the start of every sequence."""
        hidden: Tensor = self.lstm(x)[0]
        return hidden


class FeedForwardLevel(nn.Module):
    """W₂ gelu(W₁ norm(x)), plus x where the width stays: `[B, T, D]` → `[B, T, O]`."""

    def __init__(self, width: int, hidden: int, output: int | None = None) -> None:
        super().__init__()
        self.residual = output is None
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width if output is None else output)

    def forward(self, x: Tensor) -> Tensor:
        """The two-layer network, and the residual around it."""
        y: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return x + y if self.residual else y


class NestedModel(nn.Module):
    """An LSTM and two feed-forward levels in a row, to be trained at three frequencies (§7.1 of the paper).

    All parameters belong to a level of `levels`: "level1_fast" (the LSTM), "level2_medium" and
    "level3_slow", which makes the output. `setup_optimizers` gives each an optimizer of its own.

    Args:
        input_size: width D of the input.
        hidden_size: hidden width of the feed-forward levels.
        output_size: width O of the output; None = `input_size`.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> model = NestedModel(input_size=768, hidden_size=3072)
        >>> y = model(torch.randn(4, 16, 768))  # [4, 16, 768]
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int | None = None) -> None:
        super().__init__()
        output_size = input_size if output_size is None else output_size
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "output_size": output_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.input_size, self.output_size = input_size, output_size
        self.levels = nn.ModuleDict(
            {
                "level1_fast": RecurrentLevel(input_size),
                "level2_medium": FeedForwardLevel(input_size, hidden_size),
                "level3_slow": FeedForwardLevel(input_size, hidden_size, output_size),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, D]` → `[B, T, O]`; `[B, D]`, sequences of one step, → `[B, O]`."""
        return self.activations(x)["level3_slow"]

    def activations(self, x: Tensor) -> dict[str, Tensor]:
        """What every level hands to the next, by name; the last one is the output.

        Raises:
            ValueError: `x` is not `[B, T, D]` or `[B, D]` in floating point, or is empty.
        """
        width = self.input_size
        shaped = isinstance(x, Tensor) and x.dim() in (2, 3) and x.shape[-1] == width and 0 not in x.shape
        if not shaped or not x.is_floating_point():
            raise ValueError(
                f"input must be [batch, time, {width}] or [batch, {width}], not empty, got {describe(x)}"
            )
        y = x[:, None] if x.dim() == 2 else x
        found = {}
        for name, level in self.levels.items():
            y = level(y)
            found[name] = y[:, 0] if x.dim() == 2 else y
        return found


class AuxiliaryHeads(nn.Module):
    """Losses on what levels hand on: each of them has a linear head that must predict the targets itself.

    A level that is updated often then also learns from a loss close to it, and not only through slower
    levels that stand still. The heads are no part of a model's levels: give them an optimizer of their own.

    Args:
        model: whose activations are read.
        weights: name of a level → weight of its loss.

    Raises:
        ValueError: no level or an unknown one, the last one (its output is the prediction), or a weight
            that is not positive.

    Example:
        >>> heads = AuxiliaryHeads(model, {"level1_fast": 0.3, "level2_medium": 0.1})
        >>> found = model.activations(x)
        >>> loss = criterion(found["level3_slow"], targets) + heads(found, targets, criterion)
    """

    def __init__(self, model: NestedModel, weights: Mapping[str, float]) -> None:
        super().__init__()
        inner = list(model.levels)[:-1]
        if not weights:
            raise ValueError(f"weights must name at least one of {', '.join(inner)}")
        for name, weight in weights.items():
            if name not in inner:
                raise ValueError(f"weights must name levels of {', '.join(inner)}, got {name!r}")
            if not 0 < weight < math.inf:
                raise ValueError(f"weights[{name!r}] must be positive and finite, got {weight}")
        self.weights = dict(weights)
        self.heads = nn.ModuleDict({name: nn.Linear(model.input_size, model.output_size) for name in weights})

    def losses(
        self, activations: Mapping[str, Tensor], targets: Tensor, criterion: Criterion
    ) -> dict[str, Tensor]:
        """Loss of every head, without its weight."""
        return {name: criterion(head(activations[name]), targets) for name, head in self.heads.items()}

    def forward(self, activations: Mapping[str, Tensor], targets: Tensor, criterion: Criterion) -> Tensor:
        """Weighted sum of the losses of all heads, a scalar."""
        losses = self.losses(activations, targets, criterion)
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
