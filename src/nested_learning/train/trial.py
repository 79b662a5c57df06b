"""A trial of a run that names no data: the text it trains on, and settings that fit this machine.

On a GPU only accumulation and activation checkpointing change, which do not change the gradient. On a CPU a
step reads one row, because a step with the configured number of rows would take hours.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from nested_learning.data.config import DataConfig
from nested_learning.data.corpus import BUNDLED
from nested_learning.data.shards import ShardFolder
from nested_learning.train.config import RunConfig
from nested_learning.train.memory import host_bytes
from nested_learning.train.plan import (
    GIB,
    Hardware,
    count_blocks,
    count_parameters,
    make_plan,
    optimizer_numbers,
)
from nested_learning.train.strategy import Strategy

SAMPLES = ("outputs/data/sample_hub", "outputs/data/sample")
"""Where `scripts/data/run_sample.sh` puts its shards."""

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., 2022 ("Chinchilla")
ROOM = 0.9  # of the memory; the rest is for libraries, fragmentation and other programs
H100 = Hardware(gpus=1, memory_gb=80, peak_tflops=989, mfu=0.2, sharded=True)  # the defaults of `nl plan`


def names_no_data(data: DataConfig) -> bool:
    """Whether a configuration names neither text nor shards."""
    return not data.files and data.shards is None


def with_sample(config: RunConfig) -> tuple[RunConfig, str]:
    """The run on the sample shards if there are shards of its vocabulary, else on the bundled text.

    Returns:
        The run, and a line that says what it trains on.
    """
    wanted = config.data.tokenizer.vocab_size
    passed = []
    for folder in SAMPLES:
        try:
            size = ShardFolder(folder).tokenizer().vocab_size
        except FileNotFoundError:
            continue
        if size == wanted:
            data = replace(config.data, shards=folder)
            return replace(config, data=data), f"no data named: training on the sample shards in {folder}"
        passed.append(f" ({folder} has a vocabulary of {size:,}, not {wanted:,})")
    line = "no data named: training on the text that comes with the package" + "".join(passed)
    return replace(config, data=replace(config.data, files=(BUNDLED,))), line


def fit_trial(config: RunConfig, strategy: Strategy) -> tuple[RunConfig, str]:
    """The run in micro-batches that fit the devices it was started on, and a line with the estimate
    of `nl plan` for a GPU.

    On a CPU a step reads one row per process instead of `train.batch_size`, and the line says so.

    Raises:
        ValueError: not even one row fits.
    """
    blocks, kept = count_blocks(config), optimizer_numbers(config)
    wanted = make_plan(config, blocks, kept, H100)
    line = (
        f"it is made for a GPU: by `nl plan` {wanted.days:.1f} days on one H100 "
        f"({wanted.memory / GIB:.0f} of 80 GiB, {wanted.tokens_per_second:,.0f} tokens/s, "
        "at 20 % of its peak)"
    )
    here = replace(
        H100,
        gpus=strategy.world_size,
        memory_gb=ROOM * device_gib(strategy),
        sharded=strategy.shards_parameters,
    )
    if strategy.device.type == "cpu" and config.train.batch_size > strategy.world_size:
        rows = config.train.batch_size
        train = replace(config.train, batch_size=strategy.world_size, accumulation=1)
        config = replace(config, train=train)
        line += f"; on a CPU, a step of this trial reads {train.batch_size} of {rows} rows"
    for checkpointing in dict.fromkeys((config.parallel.activation_checkpointing, True)):
        parallel = replace(config.parallel, activation_checkpointing=checkpointing)
        plan = make_plan(replace(config, parallel=parallel), blocks, kept, here)
        if plan.memory <= here.memory_gb * GIB:
            parts = max(plan.accumulation, config.train.accumulation)
            return replace(config, parallel=parallel, train=replace(config.train, accumulation=parts)), line
    raise ValueError(
        f"{config.name} needs {plan.memory / GIB:.1f} GiB even with one row at a time, and "
        f"{here.memory_gb:.1f} of {device_gib(strategy):.1f} GiB can be used on {strategy.device}; {line}"
    )


def device_gib(strategy: Strategy) -> float:
    """GiB of memory for one process: that of its GPU, or its share of the machine's."""
    if strategy.device.type == "cuda":
        return torch.cuda.get_device_properties(strategy.device).total_memory / GIB
    return host_bytes() / GIB / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def describe_trial(config: RunConfig, tokens: int) -> str:
    """A line that compares the number of tokens with the number that the run needs."""
    parameters, train = count_parameters(config), config.train
    read = train.steps * train.batch_size * train.seq_len
    return (
        f"{tokens / 1e6:.2f} M tokens are there, and will be read {read / tokens:,.0f} times; "
        f"{parameters / 1e6:.0f} M parameters want {TOKENS_PER_PARAMETER * parameters / 1e9:.1f} G "
        f"({TOKENS_PER_PARAMETER} each, Hoffmann et al., 2022): "
        "give yours with data.files=[a.txt,b.txt] or data.shards=FOLDER"
    )
