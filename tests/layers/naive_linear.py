"""The gated delta rule token by token, from its equations: the oracle of the layer.

    S_t = β_t S_{t−1} + η_t v_t k_tᵀ
    W_t = α_t W_{t−1} − η_t W_{t−1} k_t k_tᵀ + S_t,        y_t = W_t q_t

The second term is there with `delta` only; without momentum β = 0, and without retention α = 1.
"""

from __future__ import annotations

import torch
from naive_streams import controlled, output, slow_streams, unit
from torch import Tensor

from nested_learning.layers.linear import GatedDeltaRule


def naive_linear(layer: GatedDeltaRule, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The layer over `x [B, T, D]` from the start of a context: its output, and W (and S) `[B, H, d, d]`."""
    config, batch = layer.config, x.shape[0]
    (ks, vs, qs), logits = slow_streams(layer, x)
    width = ks.shape[-1]
    weights = momentum = x.new_zeros(batch, layer.heads, width, width)
    limit = 1.0 if config.eta_max is None else config.eta_max
    answers = []
    for t in range(x.shape[1]):
        key, query = unit(ks[:, t]), unit(qs[:, t])
        value = vs[:, t]
        rates = torch.sigmoid(logits[:, t])[..., None, None]  # [B, G, H, 1, 1]
        alpha = rates[:, 1] if config.retention else torch.ones_like(rates[:, 1])
        eta = controlled(config, limit * rates[:, 0], alpha)
        added = eta * torch.einsum("bho,bhd->bhod", value, key)
        momentum = rates[:, 2] * momentum + added if config.momentum else added
        kept = alpha * weights
        if config.delta:
            seen = torch.einsum("bhod,bhd->bho", weights, key)
            kept = kept - eta * torch.einsum("bho,bhd->bhod", seen, key)
        weights = kept + momentum
        answers.append(torch.einsum("bhod,bhd->bho", weights, query))
    finals = (weights, momentum) if config.momentum else (weights,)
    return output(layer, torch.stack(answers, 1), x), finals
