"""A language model of two layers and the configuration of a run that takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nested_learning.train.config import RunConfig, run_config


class TinyModel(nn.Module):
    """`logits, state = model(tokens)` without any context: an embedding, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, 16)
        self.norm = nn.RMSNorm(16)
        self.head = nn.Linear(16, 257)

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return self.head(self.norm(self.embedding(tokens))), None


def tiny_config(folder: Path, name: str, **train: Any) -> RunConfig:
    settings = {"steps": 8, "seq_len": 12, "batch_size": 4, "log_every": 1, "save_every": 3, "eval_every": 4}
    return run_config(
        {
            "name": name,
            "optim": {"lr": 1e-2, "warmup_steps": 2},
            "logging": {"progress": False},
            "train": {**settings, "output_dir": str(folder), "device": "cpu", **train},
        }
    )
