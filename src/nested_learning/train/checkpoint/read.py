"""Load checkpoints in one process, without an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nested_learning.data.tokenizer import Tokenizer
from nested_learning.models.lm import HopeLM
from nested_learning.train.checkpoint.errors import CheckpointError
from nested_learning.train.checkpoint.run_file import read_run, saved_config, saved_tokenizer
from nested_learning.train.checkpoint.single_file import read_description as read_header
from nested_learning.train.checkpoint.single_file import read_single_file
from nested_learning.train.checkpoint.store import damage, find_checkpoint, other_whole
from nested_learning.train.checkpoint.tensors import read_weights
from nested_learning.train.config import RunConfig


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Contents of a checkpoint, tensors on the CPU: "model", "step", "config", "tokenizer", "metrics" …

    Args:
        path: a checkpoint folder, an exported file, or a run directory for its latest checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or of another format.
    """
    path = find_checkpoint(path)
    if path.is_file():
        return read_single_file(path)
    if problem := damage(path):
        other = other_whole(path)
        raise CheckpointError(f"{problem}; the newest whole one is {other}" if other else problem)
    return {**read_run(path), "model": read_weights(path)}


def load_checkpoint(
    path: str | Path,
    device: torch.device | str = "cpu",
    config: RunConfig | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[HopeLM, Tokenizer, RunConfig]:
    """Model (in evaluation mode, on `device`), tokenizer and configuration of a checkpoint.

    Args:
        path: a checkpoint folder, a file made by `nl export`, or a run directory for its latest checkpoint.
        device: the device of the model.
        config, tokenizer: used instead of those in the checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another format; its weights do not fit its
            configuration; or its tokenizer has another vocabulary than its weights.
    """
    path = find_checkpoint(path)
    run = read_checkpoint(path)
    config = config or saved_config(run, path)
    tokenizer = tokenizer or saved_tokenizer(run, path)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise CheckpointError(
            f"checkpoint {path}: its tokenizer has {tokenizer.vocab_size} tokens "
            f"but its weights are for {config.model.vocab_size}"
        )
    model = HopeLM(config.model)
    put_weights(model, run["model"], path, assign=True)
    return model.to(device).eval(), tokenizer, config


def read_description(path: Path) -> dict[str, Any]:
    """The description of the run in a checkpoint folder or an exported file, without its tensors.

    Raises:
        CheckpointError: it cannot be read, or is of another format.
    """
    return read_header(path) if path.is_file() else read_run(path)


def put_weights(model: HopeLM, weights: dict[str, Tensor], path: Path, assign: bool = False) -> None:
    """Load the weights of the checkpoint at `path` into `model`; with `assign`, without copying them.

    Raises:
        CheckpointError: other names or shapes.
    """
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of checkpoint {path} do not fit its model: {error}") from error
