"""Fully sharded data parallel (FSDP2): parameters, gradients and optimizer state sharded over the ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nested_learning.train.config import ParallelConfig
from nested_learning.train.strategy.distributed import DistributedStrategy

warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # none is written to
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class FSDPStrategy(DistributedStrategy):
    """`fully_shard` on every block, then on the rest (embedding, norm, head).

    A block starts its memories from its parameters inside its own forward pass, where they are gathered.
    """

    name = "fsdp"
    shards_parameters = True

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> tuple[nn.Module, Optimizer]:
        """The model, sharded in place, and an optimizer of its shards."""
        options = shard_options(self.config.parallel)
        options["mesh"] = init_device_mesh(self.device.type, (self.world_size,))
        for block in getattr(model, "blocks", ()):
            fully_shard(block, reshard_after_forward=self.config.parallel.reshard_after_forward, **options)
        fully_shard(model, reshard_after_forward=False, **options)  # needed again at once
        assert isinstance(model, FSDPModule)
        self.wrapped: Any = model
        model.init_state = _refuse_init_state  # type: ignore[assignment]
        return model, make_optimizer(model)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """See `Strategy.micro_step`."""
        self.wrapped.set_requires_gradient_sync(last)
        yield

    def saved_tensors(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        """See `Strategy.saved_tensors`: shards."""
        self._reshard()
        return super().saved_tensors(model, optimizer)

    def save_parts(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, background: bool
    ) -> tuple[dict[str, Any], Future[Any] | None]:
        """See `Strategy.save_parts`: every rank writes its shards."""
        self._reshard()
        return super().save_parts(folder, model, optimizer, background)

    def load_parts(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, values: dict[str, Any]
    ) -> None:
        """Inverse of `save_parts`."""
        self._reshard()
        super().load_parts(folder, model, optimizer, values)

    def _reshard(self) -> None:
        """Reshard parameters that a forward pass without a backward pass left gathered."""
        for module in self.wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Global norm of the gradient, over all shards; see `Strategy.clip`."""
        norm = super().clip(model, max_norm)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return whole.to(self.device)


def shard_options(parallel: ParallelConfig) -> dict[str, Any]:
    """Keyword arguments of `fully_shard`."""
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[parallel.gather_dtype],
        reduce_dtype=DTYPES[parallel.reduce_dtype] or torch.float32,
        cast_forward_inputs=False,  # autocast decides, as in the other strategies
    )
    options: dict[str, Any] = {"mp_policy": policy}
    if parallel.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    return options


def _refuse_init_state(batch: int) -> None:
    raise RuntimeError(
        "init_state is not available on a sharded model, whose parameters are whole inside of forward only; "
        "call model(tokens) without a state, or load_checkpoint the run"
    )
