"""Run directories with invented numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.train.config import RunConfig, TrainConfig

LEVELS = (LevelSpec(name="quick", chunk_size=4), LevelSpec())


def run_of(folder: Path, name: str, validated: bool = True, **train: Any) -> RunConfig:
    """A run of 40 steps of 2 x 10 tokens in `folder/name`, which has logged steps 10, 20 and 30."""
    model = HopeConfig(
        vocab_size=257, dim=16, num_layers=1, num_heads=2, chunk_size=4, levels=LEVELS, seq_len=10
    )
    settings = {"steps": 40, "seq_len": 10, "batch_size": 2, "output_dir": str(folder), **train}
    config = RunConfig(name=name, model=model, train=TrainConfig(**settings))
    config.run_dir.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config.to_dict()), config.run_dir / "config.yaml")
    write_lines(config.run_dir / "metrics.jsonl", rows(validated))
    return config


def rows(validated: bool) -> list[dict[str, float]]:
    """Three logged steps, at 10, 20 and 40 tokens a second: 20, 10 and 5 seconds of training."""
    found: list[dict[str, float]] = []
    for step, loss, speed in ((10, 5.5, 10.0), (20, 4.25, 20.0), (30, 4.0, 40.0)):
        found.append(
            {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "tokens": 20 * step}
            | {"tokens_per_second": speed, "memory_gib": 0.5}
        )
    if validated:
        for step, loss, bits in ((10, 5.4321, 3.1), (20, 4.3217, 2.6789), (30, 4.4567, 2.7654)):
            levels = {"level/quick/change": step / 1000 + 0.1234, "level/quick/frozen_loss_rise": 0.04321}
            found.append({"step": step, "valid_loss": loss, "valid_bits_per_byte": bits, **levels})
    return found


def write_lines(path: Path, values: list[Any]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
