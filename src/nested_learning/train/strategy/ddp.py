"""Distributed data parallel: every rank holds the whole model and its rows of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nested_learning.train.strategy.distributed import DistributedStrategy


class DDPStrategy(DistributedStrategy):
    """Gradients are all-reduced during the backward pass of a step's last micro-batch."""

    name = "ddp"

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> tuple[nn.Module, Optimizer]:
        """The model in DDP, and an optimizer of its parameters."""
        devices = [self.device] if self.device.type == "cuda" else None
        self.wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        return self.wrapped, make_optimizer(model)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """See `Strategy.micro_step`."""
        if last:
            yield
        else:
            with self.wrapped.no_sync():
                yield
