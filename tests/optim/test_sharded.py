"""M3 and delta gradient descent on two processes: sharded parameters (FSDP2), and whole ones (DDP)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from nested_learning.optim import (
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    GeneralizedGradientDescent,
    build_optimizer,
)
from nested_learning.optim.config import M3Config, OptimConfig

CONFIGS = {
    "m3": OptimConfig(name="m3", lr=0.01, m3=M3Config(slow_every=3, ns_dtype="float32")),
    "dgd": OptimConfig(name="dgd", lr=0.1, adamw_lr_scale=0.1),
}


WHOLE = {  # the optimizer, the reduction of its loss, and its rate on one process over that on two
    "mean": (DeltaGradientDescent, "mean", 1.0),
    "sum": (lambda m, lr: DeltaGradientDescent(m, lr=lr, reduction="sum"), "sum", 0.5),
    "huber": (GeneralizedGradientDescent, "mean", 1.0),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 9))


def train(model: nn.Module, name: str, rank: int, ranks: int) -> None:
    """Ten steps; every rank has its part of the same rows."""
    optimizer = build_optimizer(CONFIGS[name], model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 9, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(x.chunk(ranks)[rank]), y.chunk(ranks)[rank]).backward()
        optimizer.step()


def train_whole(model: nn.Module, optimizer: torch.optim.Optimizer, reduction: str, rank: int, ranks: int):
    """Two micro-batches in every step; the gradients of processes are averaged."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        optimizer.zero_grad()
        for _ in range(2):
            x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 9, generator=generator)
            loss = F.mse_loss(model(x.chunk(ranks)[rank]), y.chunk(ranks)[rank], reduction=reduction)
            (loss / 2).backward()
        optimizer.step()


def worker(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for name in CONFIGS:
        model = network()
        fully_shard(model, mesh=mesh)
        train(model, name, rank, 2)
        full = {key: p.full_tensor() for key, p in model.named_parameters()}
        if rank == 0:
            torch.save(full, f"{folder}/{name}.pt")
    for name, (make, reduction, _) in WHOLE.items():
        model = network()
        train_whole(nn.parallel.DistributedDataParallel(model), make(model, lr=0.02), reduction, rank, 2)
        torch.save(model.state_dict(), f"{folder}/{name}_{rank}.pt")
    for make in (DeltaMomentum, DeepMomentum, GeneralizedGradientDescent):
        model = network()
        fully_shard(model, mesh=mesh)
        with pytest.raises(NotImplementedError, match="does not take sharded parameters"):
            make(model if make is GeneralizedGradientDescent else model.parameters())
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    for name in CONFIGS:
        alone = network()
        train(alone, name, 0, 1)
        start = dict(network().named_parameters())
        spread = torch.load(tmp_path / f"{name}.pt")
        for key, p in alone.named_parameters():
            assert (p - start[key]).norm() > 1e-3
            torch.testing.assert_close(spread[key], p.detach(), rtol=1e-3, atol=1e-4)
    for name, (make, reduction, rate) in WHOLE.items():
        alone = network()
        train_whole(alone, make(alone, lr=0.02 * rate), reduction, 0, 1)
        start = network().state_dict()
        first, second = (torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(2))
        for key, value in alone.state_dict().items():
            assert torch.equal(first[key], second[key])
            assert (value - start[key]).norm() > 1e-3
            torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)
