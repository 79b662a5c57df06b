"""The write of one linear memory, token by token. Slow, obvious, and the oracle of `chunk.py`.

    S_t = β_t S_{t−1} − η_t e_t k_tᵀ
    W_t = α_t W_{t−1} + (1 − α_t) W_init − η_t W_{t−1} k_t k_tᵀ + S_t          Eqs. 57 and 88, with momentum

The term in W_init is there only with retention towards the initial state, the third only with `delta`.

Shapes: `N` any leading dimensions, `T` tokens, `d` input width, `o` output width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    weights: Tensor,
    momentum: Tensor,
    key: Tensor,
    error: Tensor,
    rates: tuple[Tensor, Tensor, Tensor | None],
    delta: bool = True,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write one token: `weights, momentum [N, o, d]`, `key [N, d]`, `error [N, o]`, rates (η, α, β) `[N]`."""
    eta, alpha, beta = rates
    eta, alpha = eta[..., None, None], alpha[..., None, None]
    momentum = -eta * error[..., :, None] * key[..., None, :] + (
        0.0 if beta is None else beta[..., None, None] * momentum
    )
    kept = alpha * weights if initial is None else alpha * weights + (1 - alpha) * initial
    if delta:
        kept = kept - eta * (weights @ key[..., :, None]) @ key[..., None, :]
    return kept + momentum, momentum


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: tuple[Tensor, Tensor, Tensor | None],
    weights: Tensor,
    *,
    chunk_size: int,
    momentum: Tensor | None = None,
    objective: str = "l2",
    read: str = "chunk",
    delta: bool = True,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read and write a linear memory over a sequence; same arguments and result as `chunk.delta_rule`."""
    eta, alpha, beta = rates
    momentum = torch.zeros_like(weights) if momentum is None else momentum
    chunk_start, outputs = weights, []
    for t in range(k.shape[-2]):
        if t % chunk_size == 0:
            chunk_start = weights
        key, value, query = k[..., t, :], v[..., t, :], q[..., t, :]
        error = -value if objective == "dot" else torch.einsum("...od,...d->...o", chunk_start, key) - value
        before = weights
        rate = (eta[..., t], alpha[..., t], None if beta is None else beta[..., t])
        weights, momentum = step(weights, momentum, key, error, rate, delta, initial)
        used = {"chunk": chunk_start, "before_write": before, "after_write": weights}[read]
        outputs.append(torch.einsum("...od,...d->...o", used, query))
    return torch.stack(outputs, -2), weights, momentum
