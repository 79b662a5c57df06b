"""What a run will need, before it is started: memory per GPU, tokens per second, days, checkpoint size.

Numbers of one block are counted, not guessed: its own code runs on tensors without data, once, with one row.
All else is arithmetic. Activations are those of eager PyTorch; buffers of libraries and fragmentation come
on top.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nested_learning.config import load_config
from nested_learning.models.block import HopeBlock
from nested_learning.models.lm import HopeLM
from nested_learning.optim.build import build_optimizer
from nested_learning.train.config import RunConfig

GIB = 2**30
FLOAT = 4  # parameters, gradients, optimizer state, fast weights and logits are float32
BACKWARD = 2  # a backward pass costs about two forward passes
DAY = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One block on one row: numbers of parameters and fast weights, bytes kept for the backward pass,
    floating-point operations of the forward pass."""

    parameters: int
    fast: int
    kept: int
    flops: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
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


def count_blocks(config: RunConfig) -> list[Block]:
    """Every block of a model; those with the same levels are counted once."""
    names = [tuple(level.name for level in config.model.levels_of(n)) for n in range(config.model.num_layers)]
    counted = {kind: count_block(config, names.index(kind)) for kind in set(names)}
    return [counted[kind] for kind in names]


def count_block(config: RunConfig, layer: int = 0) -> Block:
    """Count block number `layer` by running it on fake tensors, in the run's precision."""
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
        precision = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")
        with hooks, precision, FlopCounterMode(display=False, custom_mapping={flash: attention}) as counter:
            block(x)
        own = {p.untyped_storage()._cdata for p in block.parameters()}
        sizes = [storage.nbytes() for key, storage in kept.items() if key not in own]
        parameters = sum(p.numel() for p in block.parameters())
    return Block(parameters=parameters, fast=fast, kept=sum(sizes), flops=counter.get_total_flops())


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


def make_plan(config: RunConfig, blocks: list[Block], kept_per_parameter: float, on: Hardware) -> Plan:
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
    config: RunConfig, blocks: list[Block], total: int, kept: float, on: Hardware, accumulation: int
) -> Plan:
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
    return Plan(
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


def report(config: RunConfig, plans: list[Plan], kept_per_parameter: float, on: Hardware) -> str:
    """The plans as text."""
    total = count_parameters(config)
    train = config.train
    lines = [
        f"{config.name}: {total / 1e6:.0f} M parameters, {train.steps} steps of {train.batch_size} x "
        f"{train.seq_len} tokens, {train.precision}, activation checkpointing "
        + ("on" if config.parallel.activation_checkpointing else "off"),
        f"a checkpoint: {FLOAT * total * (1 + kept_per_parameter) / GIB:.2f} GiB; "
        f"its exported weights: {FLOAT * total / GIB:.2f} GiB",
        f"assumed: {on.peak_tflops:g} TFLOP/s a GPU of which {on.mfu:.0%} is reached (not measured), "
        + ("FSDP" if on.sharded else "DDP"),
        "",
        "| GPUs | rows x accumulation | parameters | gradients | optimizer | fast weights | activations "
        "| GiB per GPU | tokens/s | days |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for plan in plans:
        parts = (plan.parameters, plan.gradients, plan.optimizer, plan.fast, plan.activations)
        cells = " | ".join(f"{part / GIB:.2f}" for part in parts)
        fits = "" if plan.memory <= on.memory_gb * GIB else f" (more than {on.memory_gb:g})"
        lines.append(
            f"| {plan.gpus} | {plan.rows} x {plan.accumulation} | {cells} | {plan.memory / GIB:.1f}{fits} "
            f"| {plan.tokens_per_second:,.0f} | {plan.days:.2f} |"
        )
    return "\n".join(lines)


def add_to(parser: argparse.ArgumentParser) -> None:
    """Options of `nl plan`."""
    parser.add_argument("--config-name", default="pilot", help="an entry of configs/, or a YAML file")
    parser.add_argument("--gpus", default="1,8,64", help="one number, or several with commas")
    parser.add_argument("--memory-gb", type=float, default=80, help="memory of a GPU in GiB")
    parser.add_argument("--peak-tflops", type=float, default=989, help="peak of a GPU (H100, dense bf16)")
    parser.add_argument("--mfu", type=float, default=0.2, help="share of the peak that is reached")
    parser.add_argument("--ddp", action="store_true", help="every GPU holds the whole model")
    parser.add_argument("overrides", nargs="*", help="as in train.seq_len=4096")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan. ValueError for numbers that make no sense."""
    try:
        counts = [int(count) for count in str(options.gpus).split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"--gpus must be whole numbers of at least 1, got {options.gpus!r}")
    for name in ("memory_gb", "peak_tflops"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu must be in (0, 1], got {options.mfu}")
    config = load_config(options.config_name, options.overrides)
    devices = [
        Hardware(
            gpus=count,
            memory_gb=options.memory_gb,
            peak_tflops=options.peak_tflops,
            mfu=options.mfu,
            sharded=not options.ddp,
        )
        for count in counts
    ]
    blocks, kept = count_blocks(config), optimizer_numbers(config)
    plans = [make_plan(config, blocks, kept, on) for on in devices]
    print(report(config, plans, kept, devices[0]))
    return 0
