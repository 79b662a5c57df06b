"""Self-describing checkpoints: one file holds all that a run, or an evaluation, needs.

Layout of a run's `checkpoints/`: `step_00000100.pt` …, and `index.json` naming the latest and the best.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nested_learning.config import RunConfig, run_config
from nested_learning.data.loader import TokenLoader
from nested_learning.data.tokenizer import Tokenizer, load_tokenizer
from nested_learning.models.lm import HopeLM
from nested_learning.train.random_state import random_state, set_random_state

VERSION = 1
KEYS = ("version", "step", "model", "optimizer", "loader", "random", "tokenizer", "config", "metrics")
INDEX = "index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


@dataclass(kw_only=True, slots=True)
class Training:
    """The parts of a run that a checkpoint saves and restores."""

    config: RunConfig
    model: nn.Module
    optimizer: Optimizer
    loader: TokenLoader
    tokenizer: Tokenizer

    def payload(self, step: int, metrics: dict[str, float]) -> dict[str, Any]:
        """Everything needed to go on after `step` updates, as tensors and plain values."""
        return {
            "version": VERSION,
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "random": random_state(),
            "tokenizer": self.tokenizer.state(),
            "config": self.config.to_dict(),
            "metrics": metrics,
        }


class CheckpointStore:
    """The checkpoints of one run. Keeps the newest `keep_last` and the one with the lowest validation loss.

    Every file is written beside its place and renamed, so a kill at any time leaves the former one whole.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory = directory
        self.keep_last = keep_last
        directory.mkdir(parents=True, exist_ok=True)
        for scrap in directory.glob("*.tmp"):  # of a process killed while it wrote
            scrap.unlink()

    def save(self, payload: Mapping[str, Any]) -> Path:
        """Write a checkpoint, make it the latest, delete those no longer wanted."""
        path = self.directory / f"step_{payload['step']:08d}.pt"
        write_atomic(path, payload)
        index = self._index()
        loss = payload["metrics"].get("valid_loss")
        if loss is not None and loss < index.get("best_loss", float("inf")):
            index |= {"best": path.name, "best_loss": loss}
        index["latest"] = path.name
        write_atomic(self.directory / INDEX, json.dumps(index, indent=2).encode())
        wanted = {index.get("best"), *(p.name for p in self._files()[-self.keep_last :])}
        for file in self._files():
            if file.name not in wanted:
                file.unlink()
        return path

    def latest(self) -> Path | None:
        """The newest checkpoint, None if there is none."""
        name = self._index().get("latest")
        return self.directory / name if name else None

    def clear(self) -> None:
        """Delete all checkpoints."""
        (self.directory / INDEX).unlink(missing_ok=True)
        for file in self._files():
            file.unlink()

    def _files(self) -> list[Path]:
        """Oldest first. By time, not by step: a run may have gone back to an earlier step."""
        return sorted(self.directory.glob("step_*.pt"), key=lambda p: (p.stat().st_mtime_ns, p.name))

    def _index(self) -> dict[str, Any]:
        path = self.directory / INDEX
        return dict(json.loads(path.read_text())) if path.is_file() else {}


def write_atomic(path: Path, content: Mapping[str, Any] | bytes) -> None:
    """Write bytes, or `torch.save` a mapping, so that `path` is at all times absent, old or complete."""
    scrap = path.with_name(path.name + ".tmp")
    with scrap.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    scrap.replace(path)


def find_checkpoint(path: str | Path) -> Path:
    """The file meant by `path`: itself, or the latest checkpoint of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    for directory in (path, path / "checkpoints"):
        if (directory / INDEX).is_file():
            return directory / str(json.loads((directory / INDEX).read_text())["latest"])
    raise CheckpointError(f"there is no checkpoint at {path}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Contents of a checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: no such file, a damaged file, or one of another format.
    """
    path = find_checkpoint(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or corrupt: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"checkpoint {path} is corrupt: {damaged} does not match its checksum")
    payload = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(payload, dict) or payload.get("version") != VERSION:
        found = payload.get("version") if isinstance(payload, dict) else type(payload).__name__
        raise CheckpointError(f"checkpoint {path} has format version {found}; this code reads {VERSION}")
    if missing := [key for key in KEYS if key not in payload]:
        raise CheckpointError(f"checkpoint {path} lacks {', '.join(missing)}")
    return payload


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[HopeLM, Tokenizer, RunConfig]:
    """Model (in evaluation mode, on `device`), tokenizer and configuration of a checkpoint.

    Args:
        path: a checkpoint, or a run directory for its latest one.
        device: where the model goes.

    Raises:
        CheckpointError: the file is missing, damaged or of another format; its weights do not fit its
            configuration; or its tokenizer has another vocabulary than its weights.
    """
    payload = read_checkpoint(path)
    config = run_config(payload["config"])
    tokenizer = load_tokenizer(payload["tokenizer"])
    if tokenizer.vocab_size != config.model.vocab_size:
        raise CheckpointError(
            f"checkpoint {path}: its tokenizer has {tokenizer.vocab_size} tokens "
            f"but its weights are for {config.model.vocab_size}"
        )
    model = HopeLM(config.model)
    _load_weights(model, payload["model"], path)
    return model.to(device).eval(), tokenizer, config


def load_training_state(path: str | Path, training: Training) -> tuple[int, dict[str, float]]:
    """Put a run back to where a checkpoint left it; the random states of the process included.

    Returns:
        The number of updates made, and the metrics saved with them.

    Raises:
        CheckpointError: see `read_checkpoint`, and a checkpoint of another model, optimizer, seed or text.
    """
    payload = read_checkpoint(path)
    _check_same_run(payload, training, path)
    _load_weights(training.model, payload["model"], path)
    training.optimizer.load_state_dict(payload["optimizer"])
    try:
        training.loader.load_state_dict(payload["loader"])
    except ValueError as error:
        raise CheckpointError(f"cannot resume from {path}: {error}") from error
    set_random_state(payload["random"])
    return payload["step"], payload["metrics"]


def _load_weights(model: nn.Module, weights: dict[str, Any], path: str | Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of checkpoint {path} do not fit its model: {error}") from error


def _check_same_run(payload: dict[str, Any], training: Training, path: str | Path) -> None:
    """Refuse to mix two runs: a resumed one must continue bit for bit."""
    old, new = run_config(payload["config"]).to_dict(), training.config.to_dict()
    differing = [
        f"{name}{key} is {new_value!r}, was {old_value!r}"
        for name in ("model", "optim", "seed")
        for key, old_value, new_value in _differences(old[name], new[name])
    ]
    if load_tokenizer(payload["tokenizer"]).fingerprint != training.tokenizer.fingerprint:
        differing.append("the tokenizer is another one")
    if differing:
        raise CheckpointError(
            f"cannot resume from {path}: {'; '.join(differing)}; "
            "train.resume=null starts anew, another name= keeps both"
        )


def _differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [(f".{k}{sub}", a, b) for k in old for sub, a, b in _differences(old[k], new.get(k))]
    return [] if old == new else [("", old, new)]
