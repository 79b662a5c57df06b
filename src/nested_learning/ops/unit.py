"""Vectors of unit length."""

from __future__ import annotations

import torch
from torch import Tensor


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / √(Σ x² + eps) over the last axis; shape and dtype as `x [..., D]`.

    Inside the root, `eps` keeps value and gradient finite at x = 0 (the gradient there is 1 / √eps).
    Computed in float32 at least.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
