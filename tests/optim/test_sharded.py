"""M3, Muon and delta gradient descent on parameters that FSDP2 spreads over two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from nested_learning.config import OptimConfig
from nested_learning.optim import DeepMomentum, DeltaMomentum, build_optimizer
from nested_learning.optim.config import M3Config

CONFIGS = {
    "m3": OptimConfig(name="m3", lr=0.01, m3=M3Config(slow_every=3, ns_dtype="float32")),
    "dgd": OptimConfig(name="dgd", lr=0.1, adamw_lr_scale=0.1),
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
    for make in (DeltaMomentum, DeepMomentum):
        model = network()
        fully_shard(model, mesh=mesh)
        model(torch.ones(1, 6)).sum().backward()
        with pytest.raises(NotImplementedError, match="does not take sharded parameters"):
            make(model.parameters()).step()
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
