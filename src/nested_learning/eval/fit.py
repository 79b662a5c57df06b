"""Whether a configuration or a tokenizer fits the weights of a checkpoint, before these are read."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from nested_learning.data.tokenizer import Tokenizer
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.train.checkpoint import CheckpointError
from nested_learning.train.checkpoint.run_file import read_run, saved_config
from nested_learning.train.checkpoint.single_file import read_description
from nested_learning.train.config import RunConfig

SHOWN = 4  # differences in an error


def check_fit(path: Path, config: RunConfig | None, tokenizer: Tokenizer | None) -> None:
    """Check a configuration and a tokenizer that replace a checkpoint's own against its description.

    Args:
        path: a checkpoint folder, or a file made by `nl export`.
        config: replaces that of the checkpoint; its model may differ in options that change no weight, such
            as a chunk size.
        tokenizer: replaces that of the checkpoint.

    Raises:
        CheckpointError: a configuration or tokenizer that does not fit, or a checkpoint without description.
    """
    if config is None and tokenizer is None:
        return
    run = read_run(path) if path.is_dir() else read_description(path)
    own = saved_config(run, path).model
    if tokenizer is not None and tokenizer.vocab_size != own.vocab_size:
        raise CheckpointError(
            f"--tokenizer-path has {tokenizer.vocab_size} tokens; checkpoint {path} is for {own.vocab_size}"
        )
    if config is not None and config.model != own and _shapes(config.model) != _shapes(own):
        differences = _differences(config.model, own)
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise CheckpointError(
            f"--config is for another model than checkpoint {path}: {', '.join(differences[:SHOWN])}{more}"
        )


def _shapes(model: HopeConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in HopeLM(model).state_dict().items()}


def _differences(model: HopeConfig, own: HopeConfig) -> list[str]:
    """Fields of two models that differ, such as "model.dim = 64 (checkpoint: 32)"."""
    ours, theirs = _flat(model), _flat(own)
    return [
        f"{name} = {ours.get(name)} (checkpoint: {theirs.get(name)})"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]


def _flat(value: Any, name: str = "model") -> dict[str, Any]:
    """Fields of nested dataclasses and of lists of them, by names such as "model.levels.0.chunk_size"."""
    if is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, tuple) and any(map(is_dataclass, value)):
        parts = [(str(i), part) for i, part in enumerate(value)]
    else:
        return {name: value}
    return {key: leaf for own, part in parts for key, leaf in _flat(part, f"{name}.{own}").items()}
