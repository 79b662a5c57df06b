"""What a run will need, before it is started: memory per GPU, tokens per second, days, checkpoint size.

Numbers of one block are counted, not guessed: its own code runs on tensors without data, once, with one row.
All else is arithmetic. Activations are those of eager PyTorch; buffers of libraries and fragmentation come
on top.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nested_learning.models.block import HopeBlock
from nested_learning.models.lm import HopeLM
from nested_learning.optim.build import build_optimizer
from nested_learning.train.config import RunConfig

GIB = 2**30
FLOAT = 4  # parameters, gradients, optimizer state, fast weights and logits are float32
BACKWARD = 2  # a backward pass costs about two forward passes
DAY = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCost:
    """One block on one row: numbers of parameters and fast weights, bytes kept for the backward pass,
    floating-point operations of the forward pass."""

    parameters: int
    fast: int
    kept: int
    flops: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """A run on `gpus` devices. All memory in bytes per device; `accumulation` is what fits best.

    parameters, gradients, optimizer: cut over the devices with FSDP, whole with DDP.
    fast, activations: of the rows of one micro-batch.
    """

    gpus: int
    accumulation: int
    rows: int
    parameters: float
    gradients: float
    optimizer: float
    fast: float
    activations: float
    tokens_per_second: float
    days: float

    @property
    def memory(self) -> float:
        """Bytes per device."""
        return self.parameters + self.gradients + self.optimizer + self.fast + self.activations


def count_blocks(config: RunConfig) -> list[BlockCost]:
    """Every block of a model; those with the same levels are counted once."""
    names = [tuple(level.name for level in config.model.levels_of(n)) for n in range(config.model.num_layers)]
    counted = {kind: count_block(config, names.index(kind)) for kind in set(names)}
    return [counted[kind] for kind in names]


def count_block(config: RunConfig, layer: int = 0) -> BlockCost:
    """Count block number `layer` by running it on fake tensors, in the run's precision.

    The GPUs that are planned for have bf16, so "auto" is that.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: torch.Size, k: torch.Size, v: torch.Size, *rest: Any, **more: Any) -> int:
        return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]

    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        block = HopeBlock(config.model, layer)
        fast = block.init_state(1).numel()
        x = torch.zeros(1, config.train.seq_len, config.model.dim, requires_grad=True)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch does not count this one
        precision = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision != "fp32")
        with hooks, precision, FlopCounterMode(display=False, custom_mapping={flash: attention}) as counter:
            block(x)
        own = {p.untyped_storage()._cdata for p in block.parameters()}
        sizes = [storage.nbytes() for key, storage in kept.items() if key not in own]
        parameters = sum(p.numel() for p in block.parameters())
    return BlockCost(parameters=parameters, fast=fast, kept=sum(sizes), flops=counter.get_total_flops())


def optimizer_numbers(config: RunConfig) -> float:
    """Numbers that the optimizer keeps per parameter, counted on a small model of the same kind."""
    width = 2 * config.model.num_heads * 8
    levels = tuple(replace(level, layers=None) for level in config.model.levels)
    model = HopeLM(replace(config.model, dim=width, num_layers=1, vocab_size=512, levels=levels))
    optimizer = build_optimizer(config.optim, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [t.numel() for entry in optimizer.state.values() for t in entry.values() if torch.is_tensor(t)]
    return sum(kept) / sum(p.numel() for p in model.parameters())


def count_parameters(config: RunConfig) -> int:
    """Parameters of the whole model."""
    with torch.device("meta"):
        model: nn.Module = HopeLM(config.model)
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Devices: their number, memory in GiB, peak rate in TFLOP/s, and the share of it that is reached."""

    gpus: int
    memory_gb: float
    peak_tflops: float
    mfu: float
    sharded: bool


def make_plan(config: RunConfig, blocks: list[BlockCost], kept_per_parameter: float, on: Hardware) -> RunPlan:
    """The plan with the fewest micro-batches that fits the memory; with the most, if none fits.

    Raises:
        ValueError: the batch has fewer rows than there are devices, or does not divide over them.
    """
    train = config.train
    if train.batch_size % on.gpus:
        raise ValueError(f"--gpus must divide train.batch_size = {train.batch_size}, got {on.gpus}")
    own_rows = train.batch_size // on.gpus
    fitting = [n for n in range(1, own_rows + 1) if own_rows % n == 0]
    total = count_parameters(config)
    plans = [_plan_of(config, blocks, total, kept_per_parameter, on, n) for n in fitting]
    return next((plan for plan in plans if plan.memory <= on.memory_gb * GIB), plans[-1])


def _plan_of(
    config: RunConfig, blocks: list[BlockCost], total: int, kept: float, on: Hardware, accumulation: int
) -> RunPlan:
    train, model = config.train, config.model
    rows = train.batch_size // on.gpus // accumulation
    shards = on.gpus if on.sharded else 1
    parameters = [block.parameters for block in blocks]
    whole = (2 * max(parameters) + total - sum(parameters)) if shards > 1 else 0
    inputs = train.seq_len * model.dim * FLOAT
    saved = sum(block.kept for block in blocks)
    if config.parallel.activation_checkpointing:
        saved = len(blocks) * inputs + max(block.kept for block in blocks)
    logits = 2 * train.seq_len * model.vocab_size * FLOAT  # and their gradient
    flops = sum(block.flops for block in blocks) + 2 * train.seq_len * model.dim * model.vocab_size
    rate = on.mfu * on.peak_tflops * 1e12 * on.gpus / ((1 + BACKWARD) * flops / train.seq_len)
    return RunPlan(
        gpus=on.gpus,
        accumulation=accumulation,
        rows=rows,
        parameters=FLOAT * (total / shards + whole),
        gradients=FLOAT * total / shards,
        optimizer=FLOAT * kept * total / shards,
        fast=FLOAT * sum(block.fast for block in blocks) * rows,
        activations=rows * (saved + logits),
        tokens_per_second=rate,
        days=train.steps * train.batch_size * train.seq_len / rate / DAY,
    )
