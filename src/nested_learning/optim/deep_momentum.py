"""Deep momentum: a two-layer network remembers the gradients of each parameter (Eq. 50).

Shapes: gradient G `[o, i]`, its rows u; hidden width h. A vector counts as rows of width 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nested_learning.ops.newton_schulz import newton_schulz
from nested_learning.optim.base import DeepOptimizer, apply, gradient, wide_type
from nested_learning.optim.config import DeepMomentumConfig

TINY = 1e-12


class DeepMomentum(DeepOptimizer):
    """Deep momentum (Eq. 50): W ← (1 − lr λ) W + lr · σ(M(u)), where M is an MLP trained on gradients.

    Each parameter has its own memory. It reads the rows u of the gradient, scaled to a mean norm of 1, and
    answers with a step for every row:

        M(u_r) = b_r + W₁ φ(u_r),   φ(u) = tanh(W₂ u)/√(h·o)

    In every step it is first trained, by one gradient step on its own objective with retention towards its
    initial weights θ₀ (b and W₁ zero, W₂ random), θ ← θ₀ + α(θ − θ₀) − η ∂J/∂θ, and then read. With
    J = ⟨M(u), g⟩ and no hidden units b is the momentum of SGD; W₁ adds what rows with a similar gradient
    learned, now and before. With J = ½‖M(u) + g‖² the memory regresses on −g.

    Args:
        params, lr, weight_decay: see `DeepOptimizer`.
        options: see `optim.config.DeepMomentumConfig`.

    Raises:
        NotImplementedError: a sharded parameter (FSDP).
    """

    rule = DeepMomentumConfig
    takes_shards = False

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, lr, weight_decay, options)

    def _initial_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """A memory: `bias [o, i]`, `w1 [i, h]`, `w2 [h, i]` and what w2 falls back to."""
        rows, columns = _as_rows(parameter).shape
        generator = torch.Generator().manual_seed(group["seed"])
        drawn = torch.randn(group["hidden"], columns, generator=generator, dtype=torch.float64)
        w2 = drawn.to(parameter.device, wide_type(parameter))
        return {
            "bias": w2.new_zeros(rows, columns),
            "w1": w2.new_zeros(columns, group["hidden"]),
            "w2": w2,
            "w2_initial": w2.clone(),
        }

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            grad, state = _as_rows(gradient(p)), self.state[p]
            inputs = grad * (math.sqrt(len(grad)) / torch.linalg.vector_norm(grad).clamp(min=TINY))
            _train(state, inputs, grad, group)
            step = _read(state, inputs)
            if group["output"] == "newton_schulz":
                step = newton_schulz(step)
            apply(p, step.mul(group["lr"]).reshape(p.shape), group)


def _as_rows(tensor: Tensor) -> Tensor:
    """`[o, i]`: rows of the first dimension; a vector or scalar as rows of width 1."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def _features(state: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """φ(u) `[o, h]` and its slope before the scale, 1 − tanh²."""
    scale = 1 / math.sqrt(max(1, len(state["w2"])) * len(inputs))
    bent = torch.tanh(inputs @ state["w2"].T)
    return bent * scale, (1 - bent.square()) * scale


def _read(state: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """M(u) of every row, `[o, i]`."""
    return state["bias"] + _features(state, inputs)[0] @ state["w1"].T


def _train(state: dict[str, Tensor], inputs: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
    """One step of gradient descent of the memory on its objective, by hand; in place."""
    features, slope = _features(state, inputs)
    error = grad  # ∂J/∂M
    if group["objective"] == "l2":
        error = grad + state["bias"] + features @ state["w1"].T
    grad_w1 = error.T @ features
    grad_w2 = ((error @ state["w1"]) * slope).T @ inputs
    decay, rate = group["decay"], group["inner_lr"]
    state["bias"].mul_(decay).sub_(error, alpha=rate)
    state["w1"].mul_(decay).sub_(grad_w1, alpha=rate)
    state["w2"].lerp_(state["w2_initial"], 1 - decay).sub_(grad_w2, alpha=rate)
