"""Linear memories that make their own targets, each written by itself, token by token.

    e_□,t = M_□,s k_t − M_□,s v_t          s: the start of the chunk
    S_□,t = β_t S_□,t−1 − η_t e_□,t k_tᵀ
    M_□,t = α_t M_□,t−1 + (1 − α_t) M_□,init − η_t M_□,t−1 k_t k_tᵀ + S_□,t

The term in M_init is there only with retention towards the initial state, the one in kkᵀ only with `delta`.
Slow, obvious, and the oracle of `chunk.py`, which knows one gain in the place of all memories.

Shapes: `N` any leading dimensions, `T` tokens, `d` input width, `o` output width of a memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.ops.delta_rule.naive import step


def write_memory(
    memory: Tensor,
    k: Tensor,
    v: Tensor,
    rates: tuple[Tensor, Tensor, Tensor | None],
    *,
    chunk_size: int,
    delta: bool = True,
    initial: Tensor | None = None,
) -> list[Tensor]:
    """A memory `[N, o, d]` before the first token and after every one of `k, v [N, T, d]`.

    Args:
        rates: η, α and β (None = no momentum), each `[N, T]`.
        chunk_size: tokens between two refreshes of the errors.
        delta: whether the delta term erases.
        initial: what retention pulls to; None = zero.
    """
    eta, alpha, beta = rates
    history, moments, chunk_start = [memory], torch.zeros_like(memory), memory
    for t in range(k.shape[-2]):
        if t % chunk_size == 0:
            chunk_start = history[-1]
        key = k[..., t, :]
        error = torch.einsum("...od,...d->...o", chunk_start, key - v[..., t, :])
        rate = (eta[..., t], alpha[..., t], None if beta is None else beta[..., t])
        after, moments = step(history[-1], moments, key, error, rate, delta, initial)
        history.append(after)
    return history


def cap_steps(eta: Tensor, forgotten: Tensor, difference: Tensor, share: float = 0.999) -> Tensor:
    """η capped softly at c = share · forgotten / ‖k − v‖, with `forgotten` 1 − α and `difference` k − v."""
    bound: Tensor = share * forgotten / difference.norm(dim=-1)
    return bound * (1 - (-eta / bound).exp())
