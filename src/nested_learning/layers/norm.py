"""Normalisation: RMSNorm, and L2-normalisation of keys and queries."""

from __future__ import annotations

from typing import Any

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


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / √(Σ x² + eps) over the last axis; shape and dtype as `x [..., D]`.

    Inside the root, `eps` keeps value and gradient finite at x = 0 (the gradient there is 1 / √eps).
    Computed in float32 at least.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y: Tensor = _L2Normalize.apply(wide, eps)  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


class _L2Normalize(torch.autograd.Function):
    """y = x r with r = (Σ x² + eps)^(−1/2); dx = r (dy − y ⟨dy, y⟩). Keeps y and r only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(eps).rsqrt_()
        y: Tensor = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        y, r = ctx.saved_tensors
        along = (d_y * y).sum(-1, keepdim=True)
        d_x: Tensor = torch.addcmul(d_y, y, along, value=-1).mul_(r)
        return d_x, None
