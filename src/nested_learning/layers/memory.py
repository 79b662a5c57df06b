"""Two-layer memories as modules: their meta-learned initial weights, their state, and their write.

What the self-modifying mixer, Titans and the fast levels of the Continuum Memory System share.

Shapes: B batch, H heads, N = B·H, n tokens, `d` input width, `h` hidden width, `o` output width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.layers.checks import check_held, check_kind, widened
from nested_learning.models.config import MemoryConfig
from nested_learning.ops.delta_rule.chunk import make_rates
from nested_learning.ops.memory_mlp import fused
from nested_learning.ops.memory_mlp.chunk import MLPWeights, MLPWritten, mlp_finish, mlp_write
from nested_learning.state import State

SMALL = 0.1  # W₁ starts small: a memory first answers with its P x


class Fast(NamedTuple):
    """A memory of every sequence: weights and momenta (None without momentum), batch and heads as one."""

    weights: MLPWeights
    momentum: MLPWeights | None = None

    def detach(self) -> Fast:
        """Cut the gradient to earlier writes."""
        moments = None if self.momentum is None else MLPWeights(*(t.detach() for t in self.momentum))
        return Fast(MLPWeights(*(t.detach() for t in self.weights)), moments)


@dataclass(frozen=True)
class MemoryState(State):
    """Fast weights of one memory, one set per sequence.

    `w1 [B, H, o, h]`, `w2 [B, H, h, d]`, and their momenta `s1`, `s2` (None without momentum).
    """

    w1: Tensor
    w2: Tensor
    s1: Tensor | None = None
    s2: Tensor | None = None

    def unpack(self) -> Fast:
        """Batch and heads as one dimension, for the operations."""
        weights = MLPWeights(self.w1.flatten(0, 1), self.w2.flatten(0, 1))
        if self.s1 is None or self.s2 is None:
            return Fast(weights)
        return Fast(weights, MLPWeights(self.s1.flatten(0, 1), self.s2.flatten(0, 1)))

    @classmethod
    def pack(cls, fast: Fast, batch: int) -> MemoryState:
        """Inverse of `unpack`."""
        return cls(*(t.reshape(batch, -1, *t.shape[1:]) for t in (*fast.weights, *(fast.momentum or ()))))


class Written(NamedTuple):
    """What a chunk's write needs of its tokens: `k, v [N, n, d]`, rates `[N, n]` (log β None = none)."""

    k: Tensor
    v: Tensor
    eta: Tensor
    log_alpha: Tensor
    log_beta: Tensor | None = None

    def join(self, more: Written) -> Written:
        """These tokens, then `more`."""
        beta = None
        if self.log_beta is not None and more.log_beta is not None:
            beta = torch.cat([self.log_beta, more.log_beta], 1)
        k, v, eta, log_alpha = (torch.cat(pair, 1) for pair in zip(self[:4], more[:4], strict=True))
        return Written(k, v, eta, log_alpha, beta)

    def split(self, lengths: list[int]) -> list[Written]:
        """Consecutive runs of tokens. (One split: the gradient of a slice is as long as the sequence.)"""
        pieces = [torch.split(t, lengths, 1) for t in self if t is not None]
        return [Written(*tensors) for tensors in zip(*pieces, strict=True)]

    def last(self, count: int) -> Written:
        """The last `count` tokens."""
        rest = self.k.shape[1] - count
        return self.split([rest, count])[1] if rest else self

    def pack(self, batch: int) -> tuple[Tensor | None, ...]:
        """As batch-first tensors `[B, H, n, …]`, for a state."""
        return tuple(None if t is None else t.reshape(batch, -1, *t.shape[1:]) for t in self)

    @staticmethod
    def unpack(tensors: tuple[Tensor | None, ...] | None) -> Written | None:
        """Inverse of `pack`."""
        if tensors is None:
            return None
        k, v, eta, log_alpha, log_beta = (None if t is None else t.flatten(0, 1) for t in tensors)
        assert k is not None and v is not None and eta is not None and log_alpha is not None
        return Written(k, v, eta, log_alpha, log_beta)


def segments(tokens: int, position: int, chunk: int) -> list[int]:
    """Lengths into which `tokens` new tokens fall between multiples of `chunk`.

    The first of them comes `position` tokens after such a multiple.
    """
    lengths: list[int] = []
    done = 0
    while done < tokens:
        lengths.append(min(chunk - (position + done) % chunk, tokens - done))
        done += lengths[-1]
    return lengths


class MemoryMLP(nn.Module):
    """The meta-learned initial weights of one two-layer memory per head.

    Args:
        heads, width, hidden, out: heads H, input width d, hidden width h, output width o.
    """

    def __init__(self, heads: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        # unit-norm inputs give z of unit variance: σ̂ is used where it bends
        self.initial_w2 = nn.Parameter(torch.randn(heads, hidden, width))
        self.initial_w1 = nn.Parameter(torch.randn(heads, out, hidden) * SMALL / math.sqrt(out))

    def initial(self, batch: int) -> MLPWeights:
        """The initial weights, repeated for every sequence: `[B·H, …]`."""
        return MLPWeights(*(_repeat(w, batch) for w in (self.initial_w1, self.initial_w2)))

    def start(self, batch: int, momentum: bool) -> Fast:
        """The memory at the start of a context."""
        weights = self.initial(batch)
        return Fast(weights, MLPWeights(*(torch.zeros_like(w) for w in weights)) if momentum else None)

    def check_state(self, state: MemoryState, momentum: bool, x: Tensor, owner: str) -> None:
        """Refuse a state of another memory, or one that does not go with the input `x [B, T, D]` of `owner`.

        Raises:
            ValueError: another shape, batch, type or device, or momenta where there are none.
        """
        check_kind(state, MemoryState, owner)
        if (state.s1 is not None) != momentum:
            raise ValueError(f"{owner} state must be {'with' if momentum else 'without'} momenta")
        for held, initial in ((state.w1, self.initial_w1), (state.w2, self.initial_w2)):
            check_held(held, initial.shape, x, owner, widened(initial))

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        heads, hidden, width = self.initial_w2.shape
        return f"heads={heads}, width={width}, hidden={hidden}, out={self.initial_w1.shape[1]}"


def _repeat(weights: Tensor, batch: int) -> Tensor:
    wide = weights.to(widened(weights))
    return wide.repeat(batch, 1, 1)  # a copy for one sequence too: a state is no view of parameters


def solve_write(
    tokens: Written, residual: Tensor, memory: Fast, config: MemoryConfig, initial: MLPWeights | None
) -> MLPWritten:
    """The write of one memory over a chunk (or its beginning), in the form that can be read inside."""
    rates = make_rates(tokens.eta, tokens.log_alpha, tokens.log_beta)
    return mlp_write(
        rates, memory.weights, memory.momentum, tokens.k, residual, initial=initial, delta=config.delta
    )


def write_memories(
    tokens: Written,
    residuals: Sequence[Tensor],
    memories: Sequence[Fast],
    config: MemoryConfig,
    initial: Sequence[MLPWeights | None],
) -> list[Fast]:
    """Several memories after a chunk with the same keys and rates; the fused form where it applies.

    Args:
        tokens: the chunk's keys and rates.
        residuals: P k − v̂ of each memory `[N, n, o]`.
        memories: at the chunk's start.
        initial: W_init of each, for retention towards it (None = towards zero).
    """
    if config.delta and tokens.log_beta is None and all(w is None for w in initial):
        shared = fused.coefficients(tokens.eta, tokens.log_alpha)
        return [Fast(w) for w in fused.write(shared, tokens.k, residuals, [m.weights for m in memories])]
    after = []
    for residual, memory, rest in zip(residuals, memories, initial, strict=True):
        written = solve_write(tokens, residual, memory, config, rest)
        after.append(Fast(*mlp_finish(written, memory.weights, memory.momentum, rest)))
    return after


def rates_from_logits(
    logits: Sequence[Tensor], config: MemoryConfig, chunk: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """η, log α and log β (None without momentum) of a write every `chunk` tokens, from their logits."""
    log_alpha = F.logsigmoid(logits[1]) if config.retention else torch.zeros_like(logits[1])
    log_beta = F.logsigmoid(logits[2]) if config.momentum else None
    return config.step_limit(chunk) * torch.sigmoid(logits[0]), log_alpha, log_beta
