"""Gradient descent that looks at its inputs: delta gradient descent (Eqs. 56–57) and its general form (59).

Shapes: W `[o, d]`, gradient G `[o, d]`, inputs x `[N, d]`, S = mean of x xᵀ `[d, d]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.optim.base import DeepOptimizer, apply, gradient, wide
from nested_learning.optim.capture import Caught, local_rows, second_moment, watch
from nested_learning.optim.config import DGDConfig

Objective = Callable[[Tensor, Tensor], Tensor]


class _InputAware(DeepOptimizer):
    """Catches the inputs of linear layers; parameters that are not their weights take gradient steps."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float,
        params: Any,
        options: dict[str, Any],
        keep_rows: bool,
    ) -> None:
        chosen = [p for p in model.parameters() if p.requires_grad] if params is None else params
        super().__init__(chosen, lr, weight_decay, options)
        weights = (p for group in self.param_groups for p in group["params"])
        self.caught = watch(model, weights, keep_rows)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and inputs."""
        super().zero_grad(set_to_none)
        for caught in self.caught.values():
            caught.clear()

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if p in self.caught:
                self._update_layer(group, p, self.caught[p])
                self.caught[p].clear()
            else:
                apply(p, gradient(p) * -group["lr"], group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "caught": self.caught}

    def _update_layer(self, group: dict[str, Any], weight: Tensor, caught: Caught) -> None:
        """Move the weight of one layer by what was caught at it; both optimizers have their own."""
        raise NotImplementedError


def _require(is_caught: bool, weight: Tensor) -> None:
    if not is_caught:
        raise RuntimeError(
            f"no input was caught for a linear weight of shape {tuple(weight.shape)}: its layer must be "
            "called in training mode, and not through torch.compile, between two steps"
        )


class DeltaGradientDescent(_InputAware):
    """Delta gradient descent (Eqs. 56–57): each linear layer regresses on minus its output gradient.

    For y = W x and u = −∂L/∂y the step is argmin_W ½‖W x − u‖² + ‖W − W_t‖²/(2η). For one input that is
    W(I − η′ x xᵀ) + η′ u xᵀ with η′ = η/(1 + η‖x‖²); the paper's η/(1 + η) is right for ‖x‖ = 1 only. For
    the mean over many rows it is (W − ηG)(I + ηS)⁻¹. With η → 0 it is gradient descent plus a decay of W
    along its inputs, which moves the end of training away from the loss's minimum; `target="relative"` has
    no such decay. Hooks on the layers see x; under DDP, S is averaged over processes as gradients are.

    Args:
        model: its `nn.Linear` weights get the rule, its other parameters plain gradient descent.
        lr, weight_decay: η, and a decoupled decay besides.
        params: parameters or groups to take; None = all of the model.
        options: see `optim.config.DGDConfig`.

    Raises:
        RuntimeError: a weight has a gradient, but its layer was not seen to read anything.

    Example:
        >>> optimizer = DeltaGradientDescent(model, lr=0.1)
        >>> loss(model(x)).backward()
        >>> optimizer.step()
    """

    rule = DGDConfig

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        params: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(model, lr, weight_decay, params, options, keep_rows=False)

    def _update_layer(self, group: dict[str, Any], weight: Tensor, caught: Caught) -> None:
        _require(caught.gram is not None, weight)
        moment = second_moment(caught, group["reduction"])
        old = wide(local_rows(weight))
        grad = local_rows(gradient(weight))
        if group["target"] == "relative":
            grad = grad - old @ moment
        new = delta_step(old, grad, moment, group["lr"], group["step"])
        apply(local_rows(weight), new - old, group)


def delta_step(weight: Tensor, grad: Tensor, moment: Tensor, lr: float, step: str = "exact") -> Tensor:
    """W after a step of delta gradient descent, argmin_W ½ mean ‖W x − u‖² + ‖W − W_t‖²/(2η).

    Args:
        weight: W_t `[o, d]`. grad: −mean u xᵀ `[o, d]`. moment: S `[d, d]`. lr: η.
        step: "exact" or "paper", see `DGDConfig`.
    """
    if step == "paper":
        rate = lr / (1 + lr)
        return weight - rate * (weight @ moment + grad)
    system = torch.eye(len(moment), dtype=moment.dtype, device=moment.device).add(moment, alpha=lr)
    factor, _ = torch.linalg.cholesky_ex(system)  # the checking variant would wait for the device
    return torch.cholesky_solve((weight - lr * grad).T, factor).T


def _dot(prediction: Tensor, target: Tensor) -> Tensor:
    return -(prediction * target).sum(-1)


def _l2(prediction: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (prediction - target).square().sum(-1)


def _huber(prediction: Tensor, target: Tensor) -> Tensor:
    return F.huber_loss(prediction, target, reduction="none").sum(-1)


OBJECTIVES: dict[str, Objective] = {"dot": _dot, "l2": _l2, "huber": _huber}
"""Of predictions and targets `[N, o]`, `[N]`; all of them curve by at most 1."""


@dataclass(kw_only=True, slots=True)
class GeneralizedConfig:
    """Options of `GeneralizedGradientDescent`: the objective, and the gradient steps towards its minimum."""

    objective: str = "huber"
    inner_steps: int = 5

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps must be at least 1, got {self.inner_steps}")


class GeneralizedGradientDescent(_InputAware):
    """Generalised gradient descent (Eq. 59): argmin_W mean J(W x, u) + ‖W − W_t‖²/(2η), u = −∂L/∂y.

    J = "dot", −⟨Wx, u⟩, is gradient descent; "l2" is delta gradient descent; "huber" is the latter with a
    pull that does not grow with the size of W x − u. The minimum is approached by `inner_steps` gradient
    steps of a safe size, η/(1 + η tr S). It keeps all inputs and output gradients of a step.

    Args:
        model, lr, weight_decay, params: as in `DeltaGradientDescent`; losses are means over rows.
        options: see `GeneralizedConfig`.
    """

    rule = GeneralizedConfig

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        params: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(model, lr, weight_decay, params, options, keep_rows=True)

    def _update_layer(self, group: dict[str, Any], weight: Tensor, caught: Caught) -> None:
        _require(bool(caught.inputs), weight)
        inputs, targets = torch.cat(caught.inputs), torch.cat(caught.output_grads) * -caught.rows
        old, lr = wide(local_rows(weight)), group["lr"]
        curvature = 0.0 if group["objective"] == "dot" else inputs.square().sum() / caught.rows
        step, new = 1 / (1 + lr * curvature), old.clone()  # over η, so that η may be 0
        for _ in range(group["inner_steps"]):
            grad = _objective_gradient(new, inputs, targets, OBJECTIVES[group["objective"]])
            new -= step * (lr * grad + new - old)
        apply(local_rows(weight), new - old, group)


@torch.enable_grad()
def _objective_gradient(weight: Tensor, inputs: Tensor, targets: Tensor, objective: Objective) -> Tensor:
    """Gradient of the mean of J over the rows with respect to W."""
    weight = weight.detach().requires_grad_()
    (grad,) = torch.autograd.grad(objective(inputs @ weight.T, targets).mean(), weight)
    return grad
