"""Normalisation of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight over the last axis (Zhang & Sennrich 2019).

    bfloat16 and float16 inputs are normalised in float32 and handed back in their own dtype. A pointwise
    layer: it has no state and returns the tensor alone.

    Args:
        dim: size of the last axis.
        eps: added to the mean square.
        gain: the weight at the start.
    """

    def __init__(self, dim: int, eps: float = 1e-6, gain: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), float(gain)))

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., D]` to the same shape and dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(wide), (x.shape[-1],), self.weight.to(wide), self.eps)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Size and eps, for `print(model)`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
