"""Reads and writes of several two-layer memories with backward passes derived by hand.

The same result as `chunk.py` for the delta term on, no momentum and retention towards zero. Memories are
stacked (`stack.py`), so that one product serves all of them; `write.py` holds the mathematics.

Shapes: `N` sequences times heads, `C` tokens, `d` input, `h` hidden and `o` output width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nested_learning.ops.memory_mlp.chunk import MLPWeights
from nested_learning.ops.memory_mlp.coefficients import Coefficients, coefficients
from nested_learning.ops.memory_mlp.stack import Outputs, Stack, none_of, read_backward
from nested_learning.ops.memory_mlp.stack import read as read_stack
from nested_learning.ops.memory_mlp.write import Kept, write_backward
from nested_learning.ops.memory_mlp.write import write as write_stack

__all__ = ["Coefficients", "coefficients", "compile_writes", "read", "write"]


@dataclass
class _Kernels:
    """The two functions of a write, as they run: eager, or compiled."""

    forward: Callable[..., tuple[Stack, Kept]] = write_stack
    backward: Callable[..., tuple[Tensor, Coefficients, Outputs, Stack]] = write_backward


kernels = _Kernels()


def compile_writes() -> None:
    """Run all writes of this process through `torch.compile`: one graph each way, one per set of shapes."""
    compiled = partial(torch.compile, dynamic=False, fullgraph=True)
    kernels.forward, kernels.backward = compiled(write_stack), compiled(write_backward)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(read_stack(x, Stack(*weights)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_full: Tensor, d_rate: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        d_x, d_weights = read_backward(x, Stack(*weights), Outputs(d_full, d_rate))
        return d_x.sum(0), *d_weights


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        c, residuals, w = Coefficients(*tensors[:5]), Outputs(*tensors[5:7]), Stack(*tensors[7:])
        after, kept = kernels.forward(k, c, residuals, w)
        ctx.save_for_backward(k, *c, *w, *kept.errors, kept.solved2, kept.inverses)
        return tuple(after)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_after: Tensor) -> tuple[Tensor, ...]:
        k, *rest = ctx.saved_tensors
        c, w, kept = Coefficients(*rest[:5]), Stack(*rest[5:8]), Kept(Outputs(*rest[8:10]), *rest[10:])
        d_k, d_c, d_residuals, d_w = kernels.backward(k, c, w, kept, Stack(*d_after))
        return d_k, *d_c, *d_residuals, *d_w


def _order(weights: Sequence[MLPWeights]) -> tuple[list[int], int]:
    """Numbers of the memories, those of output width 1 last, and how many come before them."""
    full = [i for i, w in enumerate(weights) if w.w1.shape[-2] > 1]
    return full + [i for i in range(len(weights)) if i not in full], len(full)


def _stack(weights: Sequence[MLPWeights], order: list[int], full: int) -> Stack:
    w1 = [weights[i].w1 for i in order]
    none = w1[0][None][:0]
    return Stack(
        torch.stack([weights[i].w2 for i in order]),
        torch.stack(w1[:full]) if full else none,
        torch.stack(w1[full:]) if full < len(w1) else none[:, :, :1],
    )


def _sort_back(items: Sequence[Any], order: list[int]) -> list[Any]:
    return [items[order.index(i)] for i in range(len(order))]


def read(weights: MLPWeights, x: Tensor) -> Tensor:
    """W₁ σ̂(W₂ x): `[N, C, o]` from `x [N, C, d]`."""
    w1, w2 = weights.w1[None], weights.w2[None]  # views: a token that is decoded must not copy the memory
    stack = Stack(w2, w1, w1[:0, :, :1]) if w1.shape[-2] > 1 else Stack(w2, w1[:0], w1)
    full, rate = _Read.apply(x, *stack)  # type: ignore[no-untyped-call]
    answer: Tensor = full[0] if len(full) else rate[0]
    return answer


def write(
    c: Coefficients, k: Tensor, residuals: Sequence[Tensor], weights: Sequence[MLPWeights]
) -> list[MLPWeights]:
    """Weights of several memories after one chunk.

    Args:
        c: step sizes and retentions of the chunk.
        k: keys `[N, C, d]`, of unit norm, shared by all memories.
        residuals: P k − v̂ of each memory `[N, C, o]`.
        weights: of each memory at the chunk's start, all of the same hidden width.
    """
    order, full = _order(weights)
    sorted_residuals = [residuals[i] for i in order]
    stacked = Outputs(
        torch.stack(sorted_residuals[:full]) if full else none_of(k, k.shape[-1]),
        torch.stack(sorted_residuals[full:]) if full < len(order) else none_of(k, 1),
    )
    w = _stack(weights, order, full)
    w2, w1, gate = _Write.apply(k, *c, *stacked, *w)  # type: ignore[no-untyped-call]
    return _sort_back([MLPWeights(*pair) for pair in zip([*w1, *gate], w2, strict=True)], order)
