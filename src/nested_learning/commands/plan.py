"""Memory, speed, days and checkpoint size of a run on GPUs, before it is started.

uv run nl plan --config-name target --gpus 1,8,64 --memory-gb 80 parallel.activation_checkpointing=true
"""

from __future__ import annotations

from nested_learning.checks import positive, within
from nested_learning.command import Parser
from nested_learning.config import load_config
from nested_learning.train.config import RunConfig
from nested_learning.train.plan import (
    FLOAT,
    GIB,
    Hardware,
    RunPlan,
    count_blocks,
    count_parameters,
    make_plan,
    optimizer_numbers,
)


def parser() -> Parser:
    """The options of `nl plan`."""
    made = Parser(description=__doc__)
    made.add_argument("--config-name", default="pilot", help="an entry of configs/, or a YAML file")
    made.add_argument("--gpus", default="1,8,64", help="one number, or several with commas")
    made.add_argument("--memory-gb", type=float, default=80, help="memory of a GPU in GiB")
    made.add_argument("--peak-tflops", type=float, default=989, help="peak of a GPU (H100, dense bf16)")
    made.add_argument("--mfu", type=float, default=0.2, help="share of the peak that is reached")
    made.add_argument("--ddp", action="store_true", help="every GPU holds the whole model")
    made.add_argument("overrides", nargs="*", help="as in train.seq_len=4096")
    return made


def main() -> None:
    """Print the plan."""
    options = parser().parse_args()
    try:
        counts = [int(count) for count in str(options.gpus).split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"--gpus must be whole numbers of at least 1, got {options.gpus!r}")
    positive("--memory-gb", options.memory_gb)
    positive("--peak-tflops", options.peak_tflops)
    within("--mfu", options.mfu, "(0, 1]")
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


def report(config: RunConfig, plans: list[RunPlan], kept_per_parameter: float, on: Hardware) -> str:
    """The plans as text."""
    total = count_parameters(config)
    train = config.train
    precision = "bf16" if train.precision == "auto" else train.precision  # see `count_block`
    lines = [
        f"{config.name}: {total / 1e6:.0f} M parameters, {train.steps} steps of {train.batch_size} x "
        f"{train.seq_len} tokens, {precision}, activation checkpointing "
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
