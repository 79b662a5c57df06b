"""What the linear layers of a model read, caught on the way: for optimizers that look at inputs.

Shapes: N rows (tokens of all sequences), input width d, output width o.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.optim.base import is_spread, wide


class Caught:
    """What one linear layer has read since the last `clear`; itself the forward hook of that layer.

    A class and not a closure, so that model and optimizer can be copied together.

    Args:
        keep_rows: keep inputs and output gradients of all rows instead of S.
    """

    def __init__(self, keep_rows: bool) -> None:
        self.keep_rows = keep_rows
        self.clear()

    def clear(self) -> None:
        """Forget it: S = Σ x xᵀ `[d, d]`, the number of rows, inputs `[n, d]`, output gradients `[n, o]`."""
        self.gram: Tensor | None = None
        self.rows = 0
        self.inputs: list[Tensor] = []
        self.output_grads: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Look at a forward pass, unless it is without gradients."""
        if not (torch.is_grad_enabled() and module.training and output.requires_grad):
            return
        rows = wide(inputs[0].detach().reshape(-1, inputs[0].shape[-1]))
        if self.keep_rows:
            output.register_hook(lambda grad: self._keep(rows, grad))  # type: ignore[no-untyped-call]
            return
        self.rows += rows.shape[0]
        gram = rows.T @ rows
        self.gram = gram if self.gram is None else self.gram.add_(gram)

    def _keep(self, rows: Tensor, grad: Tensor) -> None:
        self.rows += rows.shape[0]
        self.inputs.append(rows)
        self.output_grads.append(wide(grad.detach().reshape(-1, grad.shape[-1])))


def watch(model: nn.Module, weights: Iterable[Tensor], keep_rows: bool = False) -> dict[Tensor, Caught]:
    """Hook every `nn.Linear` of `model` whose weight is one of `weights`; what they catch, by weight.

    A layer that is run several times in a step (accumulation, sharing) adds up. A forward pass that is run
    again for activation checkpointing counts twice, which a mean does not notice. Modules that use a
    layer's weight without calling the layer are not seen.
    """
    wanted = {id(weight) for weight in weights}
    caught: dict[Tensor, Caught] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in wanted:
            hook = caught.setdefault(module.weight, Caught(keep_rows))
            module.register_forward_hook(hook)
    return caught


def second_moment(caught: Caught, reduction: str) -> Tensor:
    """S of a layer, `[d, d]`: mean or sum of x xᵀ over the rows of all processes."""
    assert caught.gram is not None
    if reduction == "sum":
        return _over_processes(caught.gram.clone())
    rows = torch.tensor(float(caught.rows), device=caught.gram.device)
    return _over_processes(caught.gram.clone()) / _over_processes(rows)


def _over_processes(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    distributed: Any = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def local_rows(tensor: Tensor) -> Tensor:
    """This process's rows of a matrix that is spread by rows (FSDP2), else the matrix.

    Raises:
        NotImplementedError: it is spread by columns.
    """
    if not is_spread(tensor):
        return tensor
    sharded: Any = tensor
    if any(placement.is_shard() and not placement.is_shard(0) for placement in sharded.placements):
        raise NotImplementedError(f"only parameters sharded by rows are supported, got {sharded.placements}")
    local: Tensor = sharded.to_local()
    return local
