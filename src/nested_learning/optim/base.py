"""The base class of the optimizers: steps, options in groups, exact state, sharded parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer


class DeepOptimizer(Optimizer):
    """An optimizer whose rule is `_update(group, params)`, run without gradients on the params that have one.

    All state of a parameter is made before its first update, so that checkpoints have the same entries after
    every step.

    Args:
        params: parameters, or groups of them; a group may override every option.
        lr: learning rate.
        weight_decay: decoupled: W ← (1 − lr · weight_decay) W before the step.
        options: the fields of the optimizer's options (a dataclass of `optim.config`), validated by it.

    Raises:
        ValueError: a negative rate or decay, or an option whose value is not allowed.
        TypeError: an option that does not exist.
        NotImplementedError: a sharded parameter (FSDP), where `takes_shards` is False.
    """

    rule: type[Any]
    takes_shards: ClassVar[bool] = True
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls) -> None:
        """Show the fields of `rule` as keyword arguments in `help`, with their types and defaults."""
        super().__init_subclass__()
        if "rule" in vars(cls):
            cls.__signature__ = signature_with_options(cls)

    def __init__(self, params: Any, lr: float, weight_decay: float, options: dict[str, Any]) -> None:
        chosen = self.rule(**options)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **asdict(chosen)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are validated."""
        full = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay"):
            if not 0 <= full[name] < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {full[name]}")
        self.rule(**{field.name: full[field.name] for field in fields(self.rule)})
        super().add_param_group(param_group)
        if not self.takes_shards and any(is_sharded(p) for p in self.param_groups[-1]["params"]):
            name = type(self).__name__
            raise NotImplementedError(
                f"{name} needs whole matrices and does not take sharded parameters (FSDP)"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` does, if given."""
        loss = run_closure(closure)
        rehearsal = is_rehearsal(self)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            _check(params)
            for p in params:
                if not self.state[p]:
                    self.state[p].update(self._initial_state(group, p))
            if params and not rehearsal:
                self._update(group, params)
        return loss

    def _initial_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        """All state that `parameter` will ever have, before its first update."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move `params`; every optimizer has its own."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as it was saved: in its own precision, also beside parameters of a lower one."""
        super().load_state_dict(state_dict)
        restore_precision(self, state_dict)


def signature_with_options(kind: type[DeepOptimizer]) -> inspect.Signature:
    """The signature of an optimizer's constructor, with the fields of `kind.rule` in place of `**options`."""
    _, *given = inspect.signature(kind.__init__, eval_str=False).parameters.values()
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(kind.rule)
    ]
    return inspect.Signature([*(p for p in given if p.kind is not p.VAR_KEYWORD), *options])


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """Value of the closure given to `step`, computed with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def is_rehearsal(optimizer: Optimizer) -> bool:
    """Whether this is the step by which `torch.distributed.checkpoint` makes the state of a fresh optimizer.

    There is no state, and all rates and gradients are zero. Such a step makes the state and counts nothing.
    Gradients are looked at only where the first step of all has no rate, so training does not wait for them.
    """
    groups = optimizer.param_groups
    if any(optimizer.state.values()) or any(group["lr"] != 0 for group in groups):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return not any(grad.is_sparse or bool(whole(grad).any()) for grad in grads)


def restart_counters(optimizer: Optimizer) -> None:
    """Set the steps that optimizers of torch have counted in a rehearsal back to 0."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"] * 0


def restore_precision(
    optimizer: Optimizer, state_dict: Mapping[str, Any], only: Collection[str] | None = None
) -> None:
    """Undo that `Optimizer.load_state_dict` casts states to the type of their parameters.

    Args:
        optimizer: has just loaded `state_dict`.
        only: names of the entries to restore; None = all.
    """
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, parameter in zip(ids, params, strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            loaded = optimizer.state[parameter]
            if only is not None and name not in only:
                continue
            if torch.is_tensor(value) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(device=loaded[name].device, copy=True)


def _check(params: list[Tensor]) -> None:
    for p in params:
        assert p.grad is not None
        if p.grad.is_sparse or p.is_complex():
            kind = "sparse gradients" if p.grad.is_sparse else "complex parameters"
            raise RuntimeError(f"{kind} are not supported, got one of shape {tuple(p.shape)}")


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: what sums up over many steps must not be rounded to bfloat16 in each of them."""
    return tensor.to(wide_type(tensor))


def wide_type(tensor: Tensor) -> torch.dtype:
    """The type of `wide`."""
    return torch.promote_types(tensor.dtype, torch.float32)


def wide_zeros(parameter: Tensor) -> Tensor:
    """Zeros in the shape and layout of a parameter, `wide`."""
    return torch.zeros_like(parameter, dtype=wide_type(parameter))


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that has one, `wide`."""
    assert parameter.grad is not None
    return wide(parameter.grad)


def apply(parameter: Tensor, step: Tensor, group: dict[str, Any]) -> None:
    """W ← (1 − lr · decay) W + step, rounded once."""
    decayed = wide(parameter) * (1 - group["lr"] * group["weight_decay"])
    parameter.copy_(decayed.add_(step))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes: a `DTensor`, whose import would take two seconds."""
    return hasattr(tensor, "placements") and hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that is sharded over processes; other tensors unchanged."""
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return full


def shard_like(full: Tensor, example: Tensor) -> Tensor:
    """`full`, which every process has, sharded as `example` is, without communication."""
    if not is_sharded(example):
        return full
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = example
    return distribute_tensor(full, sharded.device_mesh, sharded.placements, src_data_rank=None)
