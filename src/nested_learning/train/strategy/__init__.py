"""Strategies of training: one process, DDP, FSDP2 or DeepSpeed, behind one interface."""

from __future__ import annotations

from nested_learning.checks import one_of
from nested_learning.runtime import pick_device
from nested_learning.train.config import RunConfig
from nested_learning.train.strategy.base import OneProcess, Strategy

STRATEGIES = ("single", "ddp", "fsdp", "deepspeed")

__all__ = ["STRATEGIES", "OneProcess", "Strategy", "build_strategy"]


def build_strategy(name: str, config: RunConfig) -> Strategy:
    """The strategy called `name`. One of several processes joins its process group here.

    Args:
        name: one of `STRATEGIES`.
        config: the run; `train.device` and `parallel` matter here.

    Raises:
        ValueError: an unknown name; a device that is not there; a batch that does not divide over the
            processes; settings that the strategy does not support.
    """
    one_of("strategy", name, STRATEGIES)
    if name == "single":
        return OneProcess(pick_device(config.train.device, "train.device"))
    if name == "ddp":
        from nested_learning.train.strategy.ddp import DDPStrategy

        return DDPStrategy(config)
    if name == "fsdp":
        from nested_learning.train.strategy.fsdp import FSDPStrategy

        return FSDPStrategy(config)
    from nested_learning.train.strategy.deepspeed import DeepSpeedStrategy

    return DeepSpeedStrategy(config)
