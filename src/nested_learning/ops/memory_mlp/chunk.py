"""The write of a two-layer memory over a chunk, in closed form (the oracle is `naive.py`).

Backpropagation by hand through M(x) = P x + W₁ σ̂(W₂ x) at the weights of the chunk's start gives the errors
of both layers for all tokens at once; then W₂ is written with inputs k and W₁ with inputs σ̂(W₂k), each by
`delta_rule.chunk`. `fused.py` does the same for the common case with a backward pass derived by hand.

Shapes: `N` any leading dimensions, `C` tokens of the chunk, `d` input width, `h` hidden width, `o` output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops.delta_rule.chunk import Rates, Written, delta_write, finish, make_rates, read_inside

EPS = 1.0  # in the hidden norm: keeps the slope of σ̂ below 1.1, so that no error is amplified


class MLPWeights(NamedTuple):
    """Weights, or momenta, of a two-layer memory."""

    w1: Tensor  # [N, o, h]
    w2: Tensor  # [N, h, d]


def unit_silu(z: Tensor) -> Tensor:
    """σ̂(z) = silu(z) / √(‖silu(z)‖² + 1): an input of at most unit norm, which is what Eq. 57 assumes."""
    s = F.silu(z)
    return s * (s.square().sum(-1, keepdim=True) + EPS).rsqrt()


def unit_silu_backward(z: Tensor, grad: Tensor) -> Tensor:
    """σ̂'(z)ᵀ grad."""
    gate = torch.sigmoid(z)
    s = z * gate
    scale = (s.square().sum(-1, keepdim=True) + EPS).rsqrt()
    unit = s * scale
    tangent = scale * (grad - unit * (unit * grad).sum(-1, keepdim=True))
    return tangent * (gate + s * (1 - gate))


def predict(weights: MLPWeights, x: Tensor) -> Tensor:
    """W₁ σ̂(W₂ x): `[N, C, o]` from `x [N, C, d]`; P x is the caller's."""
    return unit_silu(x @ weights.w2.mT) @ weights.w1.mT


@dataclass(frozen=True)
class MLPWritten:
    """The write of both layers over a chunk."""

    first: Written  # of W₂, keys k
    second: Written  # of W₁, keys σ̂(W₂k)


def mlp_write(
    rates: Rates,
    weights: MLPWeights,
    momentum: MLPWeights | None,
    keys: Tensor,
    residual: Tensor,
    *,
    initial: MLPWeights | None = None,
    delta: bool = True,
) -> MLPWritten:
    """Solve for the write of one chunk with objective ½‖M(k) − v̂‖².

    Args:
        rates: step sizes and decays `[N, C]`.
        weights, momentum: of the chunk's start (momentum None = none).
        keys: `[N, C, d]`, of unit norm.
        residual: P k − v̂, `[N, C, o]`: the error but for W₁σ̂(W₂k).
        initial: W_init, for retention towards it.
        delta: whether the delta term erases.
    """
    z = keys @ weights.w2.mT
    inner = unit_silu(z)
    answer = inner @ weights.w1.mT
    error = residual + answer
    error_z = unit_silu_backward(z, error @ weights.w1)

    def apply(stack: MLPWeights | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if stack is None else (inner @ stack.w1.mT, keys @ stack.w2.mT)

    (moment1, moment2), (rest1, rest2) = apply(momentum), apply(initial)
    second = delta_write(rates, inner, error, start=(answer, moment1), initial=rest1, delta=delta)
    first = delta_write(rates, keys, error_z, start=(z, moment2), initial=rest2, delta=delta)
    return MLPWritten(first, second)


def mlp_finish(
    written: MLPWritten,
    weights: MLPWeights,
    momentum: MLPWeights | None,
    initial: MLPWeights | None = None,
) -> tuple[MLPWeights, MLPWeights | None]:
    """Weights and momenta after the chunk."""
    moments, rest = momentum or (None, None), initial or (None, None)
    w1, s1 = finish(written.second, weights.w1, moments[0], rest[0])
    w2, s2 = finish(written.first, weights.w2, moments[1], rest[1])
    return MLPWeights(w1, w2), None if s1 is None or s2 is None else MLPWeights(s1, s2)


def mlp_read_inside(
    written: MLPWritten,
    weights: MLPWeights,
    momentum: MLPWeights | None,
    queries: Tensor,
    read: str,
    initial: MLPWeights | None = None,
) -> Tensor:
    """W₁ σ̂(W₂ q) inside the chunk, before or after each token's own write: `[N, Q, o]`.

    `queries [N, Q, d]` are those of the last `Q ≤ C` tokens.
    """

    def layer(write: Written, x: Tensor, index: int) -> Tensor:
        start = (x @ weights[index].mT, None if momentum is None else x @ momentum[index].mT)
        return read_inside(write, x, start, read, None if initial is None else x @ initial[index].mT)

    return layer(written.second, unit_silu(layer(written.first, queries, 1)), 0)


def memory_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: tuple[Tensor, Tensor, Tensor | None],
    weights: MLPWeights,
    *,
    chunk_size: int,
    momentum: MLPWeights | None = None,
    read: str = "chunk",
    delta: bool = True,
    initial: MLPWeights | None = None,
) -> tuple[Tensor, MLPWeights, MLPWeights | None]:
    """Read and write a two-layer memory with given targets over a sequence, P = 1.

    Args:
        q, k: `[N, T, d]`, k of unit norm.
        v: targets `[N, T, o]`, `o = d`.
        rates: η, α and β (None = no momentum), each `[N, T]`.
        weights, momentum, initial: see `mlp_write`.
        chunk_size: tokens between two refreshes of the errors; the last chunk may be shorter.
        read: "chunk", "before_write" or "after_write".

    Returns:
        answers `[N, T, o]`, weights and momenta after the last token.
    """
    eta, alpha, beta = rates
    if beta is not None and momentum is None:
        momentum = MLPWeights(torch.zeros_like(weights.w1), torch.zeros_like(weights.w2))
    answers = []
    for first in range(0, k.shape[-2], chunk_size):
        part = slice(first, first + chunk_size)
        keys, queries = k[..., part, :], q[..., part, :]
        chunk = make_rates(
            eta[..., part], alpha[..., part].log(), None if beta is None else beta[..., part].log()
        )
        residual = keys - v[..., part, :]
        written = mlp_write(chunk, weights, momentum, keys, residual, initial=initial, delta=delta)
        if read == "chunk":
            answer = predict(weights, queries)
        else:
            answer = mlp_read_inside(written, weights, momentum, queries, read, initial)
        answers.append(queries + answer)
        weights, momentum = mlp_finish(written, weights, momentum, initial)
    return torch.cat(answers, -2), weights, momentum
