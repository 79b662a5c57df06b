"""The write of a two-layer memory, token by token, its errors by automatic differentiation.

Slow, obvious, and the oracle of `chunk.py`. Shapes: `N` any leading dimensions, `T` tokens, `d` input
width, `h` hidden width, `o` output width; weights are (W₁ `[N, o, h]`, W₂ `[N, h, d]`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.ops.delta_rule.naive import step

Weights = tuple[Tensor, Tensor]


def hidden(z: Tensor) -> Tensor:
    """σ̂(z) = silu(z) / √(‖silu(z)‖² + 1)."""
    s = z * torch.sigmoid(z)
    return s / (s.square().sum(-1, keepdim=True) + 1.0).sqrt()


def predict(weights: Weights, x: Tensor) -> Tensor:
    """W₁ σ̂(W₂ x) for one token `x [N, d]`."""
    z = torch.einsum("...hd,...d->...h", weights[1], x)
    return torch.einsum("...oh,...h->...o", weights[0], hidden(z))


def objective(difference: Tensor, limit: float | None) -> Tensor:
    """½‖e‖² of `difference [N, o]`, summed over N; beyond a norm of `limit` a line of the same slope."""
    square = difference.square().sum(-1)
    if limit is None:
        return 0.5 * square.sum()
    far = square > limit**2
    norm = torch.where(far, square, 1.0).sqrt()
    return torch.where(far, limit * (norm - 0.5 * limit), 0.5 * square).sum()


def errors(
    weights: Weights, key: Tensor, value: Tensor, skip: Tensor, limit: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """σ̂(W₂k) and the gradients of the objective at Pk + W₁σ̂(W₂k) − v, at the outputs of W₁ and of W₂."""
    z = torch.einsum("...hd,...d->...h", weights[1], key)
    inner = hidden(z)
    output = skip + torch.einsum("...oh,...h->...o", weights[0], inner)
    loss = objective(output - value, limit)
    at_output, at_z = torch.autograd.grad(loss, (output, z), create_graph=True)
    return inner, at_output, at_z


def memory_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: tuple[Tensor, Tensor, Tensor | None],
    weights: Weights,
    *,
    chunk_size: int,
    momentum: Weights | None = None,
    read: str = "chunk",
    delta: bool = True,
    initial: Weights | None = None,
    limit: float | None = None,
) -> tuple[Tensor, Weights, Weights]:
    """Read and write a two-layer memory over a sequence, with P = 1.

    Args:
        q, k, v: queries and unit-norm keys `[N, T, d]`, targets `[N, T, o]`.
        rates: η, α and β (None = no momentum), each `[N, T]`.
        weights, momentum: at the start.
        chunk_size: tokens between two refreshes of the errors.
        read: the weights that answer: "chunk", "before_write" or "after_write".
        delta: whether the delta term erases.
        initial: what retention pulls to; None = zero.
        limit: of the norm of the gradient at the output; None = no limit.

    Returns:
        answers `[N, T, o]`, weights and momentum after the last token.
    """
    eta, alpha, beta = rates
    moments = momentum or (torch.zeros_like(weights[0]), torch.zeros_like(weights[1]))
    rest = initial or (None, None)
    chunk_start, outputs = weights, []
    for t in range(k.shape[-2]):
        if t % chunk_size == 0:
            chunk_start = weights
        key, query = k[..., t, :], q[..., t, :]
        inner, at_output, at_z = errors(chunk_start, key, v[..., t, :], key, limit)
        rate = (eta[..., t], alpha[..., t], None if beta is None else beta[..., t])
        before = weights
        w1, s1 = step(weights[0], moments[0], inner, at_output, rate, delta, rest[0])
        w2, s2 = step(weights[1], moments[1], key, at_z, rate, delta, rest[1])
        weights, moments = (w1, w2), (s1, s2)
        used = {"chunk": chunk_start, "before_write": before, "after_write": weights}[read]
        outputs.append(query + predict(used, query))
    return torch.stack(outputs, -2), weights, moments
