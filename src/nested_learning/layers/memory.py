"""Two-layer memories as modules: their meta-learned initial weights, and their state.

Shapes: B batch, H heads, N = B·H, M memories, `d` input width, `h` hidden width, `o` output width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor, nn

from nested_learning.layers.checks import check_held, check_kind, widened
from nested_learning.ops.memory_mlp.chunk import Stack
from nested_learning.state import State

SMALL = 0.1  # W₁ starts small: a memory first answers with its P x


@dataclass(frozen=True)
class MemoryState(State):
    """Fast weights of a stack of memories, one set per sequence.

    Args:
        w2: first layers `[B, H, M, h, d]`.
        w1: second layers `[B, H, m, o, h]`, one tensor per output width; the m add up to M.
        s2, s1: their momenta (None without momentum).
    """

    w2: Tensor
    w1: tuple[Tensor, ...]
    s2: Tensor | None = None
    s1: tuple[Tensor, ...] | None = None

    def unpack(self) -> tuple[Stack, Stack | None]:
        """Weights and momenta with batch and heads as one dimension."""
        weights = Stack(self.w2, self.w1).map(lambda t: t.flatten(0, 1))
        if self.s2 is None or self.s1 is None:
            return weights, None
        return weights, Stack(self.s2, self.s1).map(lambda t: t.flatten(0, 1))

    @classmethod
    def pack(cls, weights: Stack, momentum: Stack | None, batch: int) -> Self:
        """Inverse of `unpack`."""

        def whole(stack: Stack) -> tuple[Any, ...]:
            return stack.map(lambda t: t.view(batch, -1, *t.shape[1:]))

        return cls(*whole(weights)) if momentum is None else cls(*whole(weights), *whole(momentum))


class MemoryMLP(nn.Module):
    """The meta-learned initial weights of one two-layer memory per head.

    Args:
        heads, width, hidden, out: heads H, input width d, hidden width h, output width o.
    """

    def __init__(self, heads: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        # unit-norm inputs give z of unit variance, so the nonlinearity is not in its linear range
        self.initial_w2 = nn.Parameter(torch.randn(heads, hidden, width))
        self.initial_w1 = nn.Parameter(torch.randn(heads, out, hidden) * SMALL / math.sqrt(out))

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        heads, hidden, width = self.initial_w2.shape
        return f"heads={heads}, width={width}, hidden={hidden}, out={self.initial_w1.shape[1]}"


def _by_width(memories: Sequence[MemoryMLP]) -> list[list[MemoryMLP]]:
    """The memories of every output width; those of one width must stand together."""
    return [list(group) for _, group in groupby(memories, lambda memory: memory.initial_w1.shape[1])]


def initial_stack(memories: Sequence[MemoryMLP], batch: int) -> Stack:
    """The initial weights of memories `[B·H, M, …]`, in float32 at least, repeated for every sequence."""

    def stacked(parameters: list[nn.Parameter]) -> Tensor:
        wide = torch.stack([p.to(widened(p)) for p in parameters], 1)
        return wide.repeat(batch, 1, 1, 1)  # a copy for one sequence too: a state is no view of parameters

    second = tuple(stacked([m.initial_w1 for m in group]) for group in _by_width(memories))
    return Stack(stacked([m.initial_w2 for m in memories]), second)


def zero_momentum(weights: Stack) -> Stack:
    """The momenta at the start of a context."""
    return weights.map(torch.zeros_like)


def check_memory(
    state: MemoryState, memories: Sequence[MemoryMLP], momentum: bool, x: Tensor, owner: str
) -> None:
    """Refuse a state of other memories, or one that does not go with the input `x [B, T, D]` of `owner`.

    Raises:
        ValueError: another shape, batch, type or device, or momenta where there are none.
    """
    check_kind(state, MemoryState, owner)
    if (state.s1 is not None) != momentum:
        raise ValueError(f"{owner} state must be {'with' if momentum else 'without'} momenta")
    groups = _by_width(memories)
    expected = [(len(memories), memories[0].initial_w2)]
    expected += [(len(group), group[0].initial_w1) for group in groups]
    for w2, w1 in ((state.w2, state.w1), *([] if state.s2 is None else [(state.s2, state.s1 or ())])):
        if len(w1) != len(groups):
            raise ValueError(f"{owner} state must hold {len(groups)} output widths, got {len(w1)}")
        for held, (count, own) in zip((w2, *w1), expected, strict=True):
            check_held(held, (own.shape[0], count, *own.shape[1:]), x, owner, widened(own))
