"""Momentum as a memory of gradients: delta rule, preconditioning, feature maps, outputs (Eqs. 46–52).

Shapes: m and g `[o, i]`; a vector counts as one row, a tensor of more dimensions as rows of its first one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nested_learning.ops.newton_schulz import newton_schulz
from nested_learning.optim.base import DeepOptimizer, apply, gradient, wide_type
from nested_learning.optim.config import DeltaMomentumConfig

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda g: g,
    "signed_square": lambda g: g * g.abs(),
    "cube": lambda g: g**3,
    "sign": torch.sign,
    "tanh": torch.tanh,
}


class DeltaMomentum(DeepOptimizer):
    """Delta momentum (Eq. 49) and its relatives:

        m ← m (αI − c gᵀg) − lr · P φ(g),   W ← (1 − lr λ) W + σ(m)

    With the decay term off and nothing else chosen it is SGD with momentum; with P, Eq. 47; with φ, Eq. 51;
    with σ = Newton–Schulz and the decay off, Muon. The printed coefficient c = 1 diverges from ordinary
    starting points, so the default is c = min(lr, α/‖g‖²), which keeps αI − c gᵀg between 0 and α.

    Args:
        params, lr, weight_decay: see `DeepOptimizer`.
        options: see `optim.config.DeltaMomentumConfig`.

    Raises:
        NotImplementedError: a sharded parameter (FSDP).
    """

    rule = DeltaMomentumConfig
    takes_shards = False

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, lr, weight_decay, options)

    def _initial_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        names = ("momentum", "second") if group["precondition"] == "diagonal" else ("momentum",)
        dtype, layout = wide_type(parameter), torch.contiguous_format  # so that `as_matrix` is a view
        zeros = {name: torch.zeros_like(parameter, dtype=dtype, memory_format=layout) for name in names}
        return {"step": 0, **zeros}

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            grad, state = gradient(p).contiguous(), self.state[p]
            state["step"] += 1
            momentum = as_matrix(state["momentum"])
            forget(momentum, as_matrix(grad), group)
            momentum.sub_(as_matrix(_write(grad, state, group)) * group["lr"])
            apply(p, _output(momentum, group).reshape(p.shape), group)


def as_matrix(tensor: Tensor) -> Tensor:
    """A view `[o, i]` of a contiguous tensor: vectors and scalars as one row."""
    return tensor.view(1, -1) if tensor.ndim < 2 else tensor.view(tensor.shape[0], -1)


def forget(momentum: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
    """m ← α m − c m gᵀg (or c ggᵀ m), in place, for `[..., o, i]`."""
    alpha = group["momentum"]
    if group["delta"] == "off":
        momentum.mul_(alpha)
        return
    size = grad.square().sum((-2, -1), keepdim=True).clamp(min=1e-30)
    coefficients = {
        "literal": torch.ones_like(size),
        "eta": torch.ones_like(size) * group["lr"],
        "normalized": group["beta"] / size,
        "capped": (alpha / size).clamp(max=group["lr"]),
    }
    fresh = _project(momentum, grad, group["side"]) * coefficients[group["delta"]]
    momentum.mul_(alpha).sub_(fresh)


def _project(momentum: Tensor, grad: Tensor, side: str) -> Tensor:
    """m gᵀg or ggᵀ m, through the smaller of the two Gram matrices."""
    if side == "left":
        return _project(momentum.mT, grad.mT, "right").mT
    rows, columns = grad.shape[-2:]
    if rows <= columns:
        return (momentum @ grad.mT) @ grad
    return momentum @ (grad.mT @ grad)


def _write(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """P φ(g)."""
    written = FEATURES[group["features"]](grad)
    if group["precondition"] == "none":
        return written
    beta = group["beta2"]
    state["second"].mul_(beta).addcmul_(grad, grad, value=1 - beta)
    corrected = state["second"] / (1 - beta ** state["step"])
    return written.div(corrected.sqrt_().add_(group["eps"]))


def _output(momentum: Tensor, group: dict[str, Any]) -> Tensor:
    """σ(m), in the scale of a step."""
    if group["output"] == "identity":
        return momentum
    free = torch.sign(momentum) if group["output"] == "sign" else newton_schulz(momentum)
    return free.mul_(group["lr"])
