"""Whether a run goes through `torch.compile`, and why it does not."""

from __future__ import annotations

import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nested_learning.train.config import RunConfig

WORTHWHILE = {"cuda": 50, "cpu": 500}
"""Steps from which on a run of `train.compile = auto` is compiled: shorter ones do not gain the time back."""


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
