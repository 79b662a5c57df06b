"""What the linear layers of a model read, caught on the way: for optimizers that look at inputs.

Shapes: N rows (tokens of all sequences), input width d, output width o.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nested_learning.optim.base import wide


@dataclass(slots=True)
class Caught:
    """Of one linear layer, since the last `clear`: S = Σ x xᵀ `[d, d]`, the number of rows, and the rows."""

    gram: Tensor | None = None
    rows: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    output_grads: list[Tensor] = field(default_factory=list)


class InputCapture:
    """Hooks on every `nn.Linear` of `model` that trains; forward passes without gradients are not seen.

    A layer that is run several times in a step (accumulation, sharing) adds up. A forward pass that is run
    again for activation checkpointing counts twice, which a mean does not notice.

    Args:
        model: the model; modules that use a layer's weight without calling the layer are not seen.
        keep_rows: keep inputs and output gradients of all rows, not only S.
    """

    def __init__(self, model: nn.Module, keep_rows: bool = False) -> None:
        self.keep_rows = keep_rows
        self.caught: dict[Tensor, Caught] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                self.caught.setdefault(module.weight, Caught())
                module.register_forward_hook(self._hook())

    def clear(self) -> None:
        """Forget what was caught."""
        for weight in self.caught:
            self.caught[weight] = Caught()

    def _hook(self) -> Callable[..., None]:
        def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled() and module.training and output.requires_grad:
                self._catch(self.caught[module.weight], inputs[0].detach(), output)

        return hook

    def _catch(self, caught: Caught, x: Tensor, output: Tensor) -> None:
        rows = wide(x.reshape(-1, x.shape[-1]))
        caught.rows += rows.shape[0]
        if not self.keep_rows:
            gram = rows.T @ rows
            caught.gram = gram if caught.gram is None else caught.gram.add_(gram)
            return

        def catch_gradient(grad: Tensor) -> None:
            caught.inputs.append(rows)
            caught.output_grads.append(wide(grad.reshape(-1, grad.shape[-1])))

        output.register_hook(catch_gradient)


def second_moment(caught: Caught, reduction: str) -> Tensor:
    """S of a layer, `[d, d]`: mean or sum of x xᵀ over the rows of all processes."""
    assert caught.gram is not None
    gram, rows = caught.gram, torch.tensor(float(caught.rows), device=caught.gram.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gram = gram.clone()
        torch.distributed.all_reduce(gram)
        torch.distributed.all_reduce(rows)
    return gram / rows if reduction == "mean" else gram


def local_rows(tensor: Tensor) -> Tensor:
    """This process's rows of a matrix that is spread by rows (FSDP2), else the matrix.

    Raises:
        NotImplementedError: it is spread by columns.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if any(placement.is_shard() and not placement.is_shard(0) for placement in tensor.placements):
        raise NotImplementedError(f"only parameters sharded by rows are supported, got {tensor.placements}")
    return tensor.to_local()
