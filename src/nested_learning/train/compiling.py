"""What a run leaves to its device: precision, `torch.compile`, CUDA graphs and kernels; and why not."""

from __future__ import annotations

import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nested_learning.ops.kernels import why_no_triton
from nested_learning.train.config import RunConfig

WORTHWHILE = {"cuda": 50, "cpu": 500}
"""Steps from which on a run of `train.compile = auto` is compiled: shorter ones do not gain the time back."""
WORTH_A_GRAPH = 20
"""Steps from which on `train.graphs = auto` makes graphs. Each costs about four steps."""


def settle(config: RunConfig, device: torch.device) -> RunConfig:
    """The run with the precision that `train.precision = auto` means on `device`.

    Every entry of a run calls this before it reads the precision, so checkpoints hold the settled one.

    Raises:
        ValueError: `train.kernels` asks for Triton, which cannot work there.
    """
    train = config.train
    reason = why_no_triton(device) if train.kernels == "triton" else None
    if reason is not None:
        raise ValueError(f"train.kernels must be auto or torch on this machine, got triton: {reason}")
    if train.precision != "auto":
        return config
    return replace(config, train=replace(train, precision="bf16" if has_bf16(device) else "fp32"))


def has_bf16(device: torch.device) -> bool:
    """Whether a card multiplies in bfloat16. A CPU is taken to be faster in float32, as most are."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def why_eager(config: RunConfig, device: torch.device, strategy: str) -> str | None:
    """The reason not to compile a run, or None if it is to be compiled.

    Args:
        config: of the run; `train.compile` other than auto decides alone.
        device: on which it runs.
        strategy: name of the parallel strategy.
    """
    train = config.train
    if train.compile != "auto":
        return None if train.compile == "true" else "train.compile = false"
    if train.steps < WORTHWHILE.get(device.type, WORTHWHILE["cpu"]):
        return f"train.steps = {train.steps} is too short to gain from compiling"
    if train.inner == "online":
        return "train.inner = online differentiates inside the forward pass"
    if config.optim.name == "dgd":
        return "optim.name = dgd watches inputs by hooks"
    if strategy == "deepspeed":
        return "DeepSpeed runs the model"
    return missing_compiler(device)


def why_no_graph(config: RunConfig, device: torch.device, strategy: str) -> str | None:
    """The reason not to run steps as CUDA graphs, or None if they do.

    Args:
        config: of the run.
        device: on which it runs.
        strategy: name of the parallel strategy.

    Raises:
        ValueError: `train.graphs = true` for a run that cannot be captured.
    """
    train = config.train
    if train.graphs == "false":
        return "train.graphs = false"
    reason = _why_no_capture(config, device, strategy)
    if train.graphs == "true":
        if reason is not None:
            raise ValueError(f"train.graphs must be auto or false for this run, got true: {reason}")
        return None
    if reason is None and train.steps < WORTH_A_GRAPH:
        return f"train.steps = {train.steps} is too short to gain from them"
    return reason


def _why_no_capture(config: RunConfig, device: torch.device, strategy: str) -> str | None:
    if device.type != "cuda":
        return f"{device.type} has none"
    if strategy != "single":
        return f"{strategy} exchanges gradients in the backward pass"
    if config.train.inner == "online":
        return "train.inner = online differentiates inside the forward pass"
    if config.optim.name == "dgd":
        return "optim.name = dgd watches inputs by hooks"
    return None


def describe_steps(config: RunConfig, device: torch.device, eager: str | None, ungraphed: str | None) -> str:
    """A line on how steps run: what was chosen, and the reason for everything that was not.

    Args:
        config: a settled run.
        device: on which it runs.
        eager, ungraphed: from `why_eager` and `why_no_graph`.
    """
    torch_only = "train.kernels = torch" if config.train.kernels == "torch" else why_no_triton(device)
    parts = [
        config.train.precision,
        "compiled" if eager is None else f"not compiled ({eager})",
        "as CUDA graphs" if ungraphed is None else f"no CUDA graphs ({ungraphed})",
        "Triton kernels" if torch_only is None else f"no Triton kernels ({torch_only})",
    ]
    return f"steps: {', '.join(parts)}"


def missing_compiler(device: torch.device) -> str | None:
    """What `torch.compile` lacks on this machine, or None if it can work."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "the package triton is not installed"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        return f"no C++ compiler was found ({' or '.join(names)})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "the headers of Python (Python.h) are not installed"
    return None


def timed_first_call(step: Callable[..., Any], tell: Callable[[str], None]) -> Callable[..., Any]:
    """`step`, which says before its first call that it compiles, and afterwards how long that took."""
    calls = 0

    def run(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            return step(*arguments)
        tell("compiling for the first step (train.compile = false trains without)")
        began = time.perf_counter()
        result = step(*arguments)
        tell(f"compiled, and made the first step, in {time.perf_counter() - began:.0f} s")
        return result

    return run
