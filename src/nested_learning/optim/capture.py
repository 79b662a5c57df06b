"""What the linear layers of a model read, caught on the way: for optimizers that look at inputs.

An input counts when a backward pass comes to the output that was made of it, as its gradient does. So forward
passes that were thrown away do not count, nor do those that activation checkpointing runs again. Passes
of `torch.autograd.grad` count as backward passes.

Shapes: N rows (tokens of all sequences), input width d, output width o.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.optim.base import is_sharded, wide


class Use:
    """One use of a layer in a forward pass; itself the backward hook of its output.

    Args:
        caught: where it counts, once between two `clear`s.
        read: input of the layer `[..., d]`.
    """

    def __init__(self, caught: Caught, read: Tensor) -> None:
        rows = read.detach().reshape(-1, read.shape[-1])
        self.caught = caught
        self.size = len(rows)
        # S is made here and not in the backward pass: checkpointed activations are not kept alive
        self.rows: Tensor | None = rows if caught.keep_rows else None
        self.gram: Tensor | None = None if caught.keep_rows else _gram(rows)
        self.output_grad: Tensor | None = None
        self.window: int | None = None

    def __call__(self, grad: Tensor) -> None:
        """Count, and with `keep_rows` add up the gradients of all passes through this use."""
        if self.window != self.caught.window:
            self.window, self.output_grad = self.caught.window, None
            self.caught.count(self)
        if self.caught.keep_rows:
            rows = wide(grad.detach().reshape(-1, grad.shape[-1]))
            self.output_grad = rows if self.output_grad is None else self.output_grad + rows


class Caught:
    """What one weight was used for in the backward passes since the last `clear`; itself a forward hook.

    A class and not a closure, so that model and optimizer can be copied together.

    Args:
        keep_rows: keep inputs and output gradients of all rows instead of S.
    """

    def __init__(self, keep_rows: bool) -> None:
        self.keep_rows = keep_rows
        self.window = 0
        self.clear()

    def clear(self) -> None:
        """Forget the numbers of uses, rows and passes, S = Σ x xᵀ `[d, d]`, and with `keep_rows` the uses."""
        self.window += 1
        self.count_of_uses = 0
        self.rows = 0
        self.passes: set[int] = set()
        self.gram: Tensor | None = None
        self.uses: list[Use] = []

    @property
    def loss_rows(self) -> float:
        """Rows that the loss is a mean of: those of one use in each pass. Several uses in a pass add up."""
        return self.rows * len(self.passes) / max(1, self.count_of_uses)

    @torch.no_grad()
    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> None:
        """Look at a forward pass that a backward pass may follow."""
        if output.requires_grad and module.weight.requires_grad:
            use = Use(self, inputs[0] if inputs else named["input"])
            output.register_hook(use)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def count(self, use: Use) -> None:
        """A backward pass has come to `use` for the first time since `clear`."""
        self.count_of_uses += 1
        self.rows += use.size
        self.passes.add(torch._C._current_graph_task_id())
        if self.keep_rows:
            self.uses.append(use)
        elif use.gram is not None:
            self.gram = use.gram.clone() if self.gram is None else self.gram.add_(use.gram)


def _gram(rows: Tensor) -> Tensor:
    """Σ x xᵀ, in float32 at least, also under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        rows = wide(rows)
        return rows.T @ rows


def watch(model: nn.Module, weights: Iterable[Tensor], keep_rows: bool = False) -> dict[Tensor, Caught]:
    """Hook every `nn.Linear` of `model` whose weight is one of `weights`; what they catch, by weight.

    Modules that use a layer's weight without calling the layer are not seen.
    """
    wanted = {id(weight) for weight in weights}
    caught: dict[Tensor, Caught] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in wanted:
            hook = caught.setdefault(module.weight, Caught(keep_rows))
            module.register_forward_hook(hook, with_kwargs=True)
    return caught


def second_moment(caught: Caught, reduction: str) -> Tensor:
    """S of a layer, `[d, d]`: x xᵀ of a row of the loss, or of all its rows, averaged over processes."""
    assert caught.gram is not None
    total = over_processes(caught.gram.clone())
    if reduction == "sum":
        return total / processes()
    return total / over_processes(total.new_tensor(caught.loss_rows)).clamp(min=1)


def over_processes(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if processes() > 1:
        distributed: Any = torch.distributed
        distributed.all_reduce(tensor)
    return tensor


def processes() -> int:
    """Number of processes that train together."""
    distributed: Any = torch.distributed
    is_several = distributed.is_available() and distributed.is_initialized()
    return int(distributed.get_world_size()) if is_several else 1


def local_rows(tensor: Tensor) -> Tensor:
    """This process's rows of a matrix that is spread by rows (FSDP2), else the matrix.

    Raises:
        NotImplementedError: it is spread by columns.
    """
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    if any(placement.is_shard() and not placement.is_shard(0) for placement in sharded.placements):
        raise NotImplementedError(f"only parameters sharded by rows are supported, got {sharded.placements}")
    local: Tensor = sharded.to_local()
    return local
