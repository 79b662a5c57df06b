"""Gradient descent that looks at its inputs: delta gradient descent (Eqs. 56–57) and its general form (59).

Shapes: W `[o, d]`, gradient G `[o, d]`, inputs x `[N, d]`, S = mean of x xᵀ `[d, d]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.optim.base import DeepOptimizer, apply, gradient, whole, wide
from nested_learning.optim.capture import (
    Caught,
    local_rows,
    over_processes,
    processes,
    second_moment,
    watch,
)
from nested_learning.optim.config import DGDConfig, GeneralizedConfig

Objective = Callable[[Tensor, Tensor], Tensor]
TINY = 1e-30


class InputAware(DeepOptimizer):
    """Catches the inputs of linear layers; parameters that are not their weights take gradient steps.

    Inputs are forgotten by `step` and by this optimizer's `zero_grad`, not by the model's.
    """

    keep_rows: ClassVar[bool] = False

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float, params: Any, options: dict[str, Any]
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{type(self).__name__} needs the module whose layers it watches, got "
                f"{type(model).__name__}; its parameters can be chosen by params="
            )
        self.model = model
        self.caught: dict[Tensor, Caught] = {}
        chosen = [p for p in model.parameters() if p.requires_grad] if params is None else params
        super().__init__(chosen, lr, weight_decay, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the model; its options are validated.

        Raises:
            ValueError: a parameter that the model does not have, so that its inputs would not be seen.
        """
        super().add_param_group(param_group)
        added = self.param_groups[-1]["params"]
        own = set(self.model.parameters())
        foreign = [p for p in added if p not in own]
        if foreign:
            del self.param_groups[-1]
            raise ValueError(
                f"parameters must be of the module given to {type(self).__name__}, "
                f"got one of shape {tuple(foreign[0].shape)} that it does not have"
            )
        self.caught |= watch(self.model, added, self.keep_rows)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` does, if given."""
        loss = super().step(closure)
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and inputs of the backward passes made so far."""
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        for caught in self.caught.values():
            caught.clear()

    def _initial_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        """Nothing but a counter: torch's checkpoint helpers want an entry of every parameter."""
        return {"step": 0}

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            caught = self.caught.get(p)
            if caught is None:
                apply(p, gradient(p) * -group["lr"], group)
            elif caught.count_of_uses:
                self._update_layer(group, p, caught)
            else:
                _require_no_gradient(p)
                apply(p, torch.zeros_like(p), group)
            self.state[p]["step"] += 1

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "model": self.model, "caught": self.caught}

    def _update_layer(self, group: dict[str, Any], weight: Tensor, caught: Caught) -> None:
        """Move the weight of one layer by what was caught at it; both optimizers have their own."""
        raise NotImplementedError


def _require_no_gradient(weight: Tensor) -> None:
    """For a layer that no backward pass came to: its gradient must be zero."""
    assert weight.grad is not None
    if bool(whole(weight.grad).any()):
        raise RuntimeError(
            f"no input was caught for a linear weight of shape {tuple(weight.shape)} that has a gradient: "
            "its layer must be called as a module, and not through torch.compile"
        )


class DeltaGradientDescent(InputAware):
    """Delta gradient descent (Eqs. 56–57): each linear layer regresses on minus its output gradient.

    For y = W x and u = −∂L/∂y the step is argmin_W ½‖W x − u‖² + ‖W − W_t‖²/(2η). For one input that is
    W(I − η′ x xᵀ) + η′ u xᵀ with η′ = η/(1 + η‖x‖²); the paper's η/(1 + η) is right for ‖x‖ = 1 only. For
    the mean over many rows it is (W − ηG)(I + ηS)⁻¹. With η → 0 it is gradient descent plus a decay of W
    along its inputs, which moves the end of training away from the loss's minimum; `target="relative"` has
    no such decay. Hooks on the layers see x, and an input counts once a backward pass has come to it. Over
    several uses of a weight in one pass S is summed, as gradients are; over passes (micro-batches) and over
    processes (DDP) it is averaged.

    Args:
        model: its `nn.Linear` weights get the rule, its other parameters plain gradient descent.
        lr, weight_decay: η, and a decoupled decay besides.
        params: parameters or groups of the model to take; None = all.
        options: see `optim.config.DGDConfig`.

    Raises:
        TypeError: `model` is no module.
        ValueError: parameters that are not the model's.
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
        super().__init__(model, lr, weight_decay, params, options)

    def _update_layer(self, group: dict[str, Any], weight: Tensor, caught: Caught) -> None:
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
    system = torch.eye(len(moment), dtype=moment.dtype, device=moment.device) + lr * moment
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


class GeneralizedGradientDescent(InputAware):
    """Generalised gradient descent (Eq. 59): argmin_W mean J(W x, u) + ‖W − W_t‖²/(2η), u = −∂L/∂y.

    J = "dot", −⟨Wx, u⟩, is gradient descent; "l2" is delta gradient descent; "huber" is the latter with a
    pull that does not grow with the size of W x − u. The minimum is approached by `inner_steps` gradient
    steps of a safe size, η/(1 + η tr S). It keeps all inputs and output gradients of a step.

    What has scaled the gradient of a weight since its backward pass (clipping of norms, `GradScaler`) scales
    its u too. Any other change of the gradient G by ΔG (clipping of values, noise) adds ⟨ΔG, W⟩ to the
    objective.

    Args:
        model, lr, weight_decay, params: as in `DeltaGradientDescent`; losses are means over rows.
        options: see `GeneralizedConfig`.

    Raises:
        NotImplementedError: a sharded parameter (FSDP), and see `DeltaGradientDescent`.
    """

    rule = GeneralizedConfig
    takes_shards = False
    keep_rows = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        params: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(model, lr, weight_decay, params, options)

    def _update_layer(self, group: dict[str, Any], weight: Tensor, caught: Caught) -> None:
        inputs = torch.cat([wide(use.rows) for use in caught.uses if use.rows is not None])
        grads = torch.cat([use.output_grad for use in caught.uses if use.output_grad is not None])
        rows = over_processes(inputs.new_tensor(caught.loss_rows)).clamp(min=1)
        factor, change = _since_the_pass(over_processes(grads.T @ inputs) / processes(), gradient(weight))
        targets = grads * (-caught.loss_rows * factor)
        old, lr = wide(weight), group["lr"]
        curvature = over_processes(inputs.square().sum()) / rows if group["objective"] != "dot" else 0.0
        step, new = 1 / (1 + lr * curvature), old.clone()  # over η, so that η may be 0
        for _ in range(group["inner_steps"]):
            total = _objective_gradient(new, inputs, targets, OBJECTIVES[group["objective"]])
            grad = over_processes(total) / rows + change
            new -= step * (lr * grad + new - old)
        apply(weight, new - old, group)


def _since_the_pass(made: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """How a gradient has changed since it was made: c and ΔG of grad = c · made + ΔG with ΔG ⊥ made."""
    size = torch.linalg.vector_norm(made).clamp(min=TINY)
    unit = made / size
    along = (grad * unit).sum()
    return along / size, grad - along * unit


@torch.enable_grad()
def _objective_gradient(weight: Tensor, inputs: Tensor, targets: Tensor, objective: Objective) -> Tensor:
    """Gradient of the sum of J over the rows with respect to W."""
    weight = weight.detach().requires_grad_()
    (grad,) = torch.autograd.grad(objective(inputs @ weight.T, targets).sum(), weight)
    return grad
