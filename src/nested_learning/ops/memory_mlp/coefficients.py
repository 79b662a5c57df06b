"""Step sizes and retentions of a chunk as its write needs them, and back.

Shapes: `N` sequences times heads, `C` tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """Of one chunk, or gradients at them. a_{s→t} is the product of the retentions after token s up to t."""

    eta: Tensor  # [N, C, 1] η_t
    inside: Tensor  # [N, C, C] η_t a_{s→t−1}, strictly lower triangular
    start: Tensor  # [N, C, 1] η_t a_{0→t−1}
    to_end: Tensor  # [N, C, 1] a_{s→C}
    start_to_end: Tensor  # [N, 1, 1] a_{0→C}


def _decay(log_alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log a_{0→t}, a_{0→t−1} and a_{s→t−1} (zero where s ≥ t)."""
    total = log_alpha.cumsum(-1)
    before = total - log_alpha
    size = total.shape[-1]
    not_past = torch.ones(size, size, dtype=torch.bool, device=total.device).triu()
    inside = (before[:, :, None] - total[:, None, :]).masked_fill(not_past, -torch.inf).exp()
    return total, before.exp(), inside


def coefficients(eta: Tensor, log_alpha: Tensor) -> Coefficients:
    """Coefficients of one chunk from η and log α `[N, C]`."""
    total, before, inside = _decay(log_alpha)
    end = total[:, -1:]
    return Coefficients(
        eta.unsqueeze(-1),
        inside * eta.unsqueeze(-1),
        (before * eta).unsqueeze(-1),
        (end - total).exp().unsqueeze(-1),
        end.exp().unsqueeze(-1),
    )


def coefficients_backward(
    eta: Tensor, log_alpha: Tensor, c: Coefficients, d: Coefficients
) -> tuple[Tensor, Tensor]:
    """Gradients at η and log α `[N, C]`."""
    _, before, inside = _decay(log_alpha)
    d_eta = (d.eta + d.start * before.unsqueeze(-1)).squeeze(-1) + (d.inside * inside).sum(-1)
    spread = d.inside * c.inside  # at log a_{s→t−1}
    d_before = spread.sum(-1) + (d.start * c.start).squeeze(-1)
    to_end = (d.to_end * c.to_end).squeeze(-1)
    d_total = d_before - spread.sum(-2) - to_end
    d_end = to_end.sum(-1, keepdim=True) + (d.start_to_end * c.start_to_end).squeeze(-1)
    later = d_total.flip(-1).cumsum(-1).flip(-1) + d_end  # log α_t is in every total from t on
    return d_eta, later - d_before
