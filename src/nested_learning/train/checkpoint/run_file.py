"""Files of tensors and plain values, and `run.pt`, which describes the run of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException

from nested_learning.data.tokenizer import Tokenizer, load_tokenizer
from nested_learning.train.checkpoint.errors import CheckpointError, cause
from nested_learning.train.config import RunConfig, run_config

VERSION = 2
RUN = "run.pt"
METADATA = ".metadata"  # of torch.distributed.checkpoint
KINDS: dict[str, type] = {
    "step": int,
    "optimizer": dict,
    "loader": dict,
    "tokenizer": dict,
    "config": dict,
    "metrics": dict,
}
WRONG_VALUES = (ValueError, KeyError, TypeError, AttributeError, OmegaConfBaseException)


def read_plain(path: Path) -> dict[str, Any]:
    """A mapping written by `torch.save`. Anything in it but tensors and plain values is refused, not run.

    Raises:
        CheckpointError: no such file, a damaged one, or one with more in it.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise CheckpointError(f"{path} cannot be read: {cause(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {_name(values)}, not a mapping")
    return values


def read_run(folder: Path) -> dict[str, Any]:
    """What a checkpoint folder says about its run: step, configuration, tokenizer, position in the data.

    Raises:
        CheckpointError: an unreadable file, or one of another format.
    """
    path = folder / RUN
    run = read_plain(path)
    if run.get("version") != VERSION:
        raise CheckpointError(f"{path} has format version {run.get('version')}; this code reads {VERSION}")
    check_kinds(run, KINDS, path)
    return run


def check_kinds(run: dict[str, Any], kinds: dict[str, type], path: Path) -> None:
    """Refuse a description of a run in which a value is missing or of another type than in `kinds`."""
    if missing := [key for key in kinds if key not in run]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    for key, kind in kinds.items():
        if not isinstance(run[key], kind):
            raise CheckpointError(f"{path}: {key} must be {kind.__name__}, got {_name(run[key])}")


def saved_config(run: dict[str, Any], path: Path) -> RunConfig:
    """The configuration in the description of a run; CheckpointError if this version does not accept it."""
    try:
        return run_config(run["config"])
    except WRONG_VALUES as error:
        raise CheckpointError(f"the configuration in checkpoint {path} is not allowed: {error}") from error


def saved_tokenizer(run: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer in the description of a run; CheckpointError if it cannot be used."""
    try:
        return load_tokenizer(run["tokenizer"])
    except WRONG_VALUES as error:
        raise CheckpointError(f"the tokenizer in checkpoint {path} cannot be used: {cause(error)}") from error


def _name(value: object) -> str:
    return type(value).__name__
