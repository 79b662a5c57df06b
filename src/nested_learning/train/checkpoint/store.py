"""The checkpoints of one run on disk: which is the latest, which the best, which may go."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nested_learning.train.checkpoint.errors import CheckpointError
from nested_learning.train.checkpoint.manifest import MANIFEST, write_manifest

INDEX = "index.json"
SCRAP = ".tmp"


class CheckpointStore:
    """The checkpoints of one run. Keeps the newest `keep_last` and the one with the lowest validation loss.

    A checkpoint is written into `step_….tmp`, gets its manifest, and is renamed, so a kill at any time leaves
    the former ones whole. One process of a run commits and deletes; all may ask for the latest.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory = directory
        self.keep_last = keep_last

    def clean(self) -> None:
        """Make the directory, and delete what a killed process left half written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for scrap in self.directory.glob(f"*{SCRAP}"):
            shutil.rmtree(scrap) if scrap.is_dir() else scrap.unlink()

    def scratch(self, step: int) -> Path:
        """The folder to write the checkpoint of `step` into."""
        return self.directory / f"step_{step:08d}{SCRAP}"

    def begin(self, step: int) -> Path:
        """Make that folder, empty."""
        folder = self.scratch(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def commit(self, step: int, metrics: Mapping[str, float]) -> Path:
        """Make what was written for `step` the latest checkpoint, and delete those no longer wanted."""
        folder = self.scratch(step)
        write_manifest(folder)
        path = folder.with_suffix("")
        if path.exists():  # of a run that went back to an earlier step
            self._delete(path)
        folder.rename(path)
        index = self._index()
        loss = metrics.get("valid_loss")
        if loss is not None and loss < index.get("best_loss", float("inf")):
            index |= {"best": path.name, "best_loss": loss}
        index["latest"] = path.name
        write_atomic(self.directory / INDEX, json.dumps(index, indent=2).encode())
        wanted = {index.get("best"), *(p.name for p in self.folders()[-self.keep_last :])}
        for old in self.folders():
            if old.name not in wanted:
                self._delete(old)
        return path

    def abort(self, step: int) -> None:
        """Delete what was written for `step`: the disk may be full."""
        shutil.rmtree(self.scratch(step), ignore_errors=True)

    def latest(self) -> Path | None:
        """The newest checkpoint, None if there is none."""
        name = self._index().get("latest")
        if name and (self.directory / name / MANIFEST).is_file():
            return self.directory / str(name)
        folders = self.folders()
        return folders[-1] if folders else None

    def best(self) -> Path | None:
        """The checkpoint with the lowest validation loss, None if none was validated."""
        name = self._index().get("best")
        return self.directory / str(name) if name and (self.directory / name / MANIFEST).is_file() else None

    def clear(self) -> None:
        """Delete all checkpoints."""
        (self.directory / INDEX).unlink(missing_ok=True)
        for folder in self.folders():
            self._delete(folder)

    def folders(self) -> list[Path]:
        """Oldest first. By time, not by step: a run may have gone back to an earlier step."""
        found = [p for p in self.directory.glob("step_*") if not p.name.endswith(SCRAP)]
        return sorted(found, key=lambda p: ((p / MANIFEST).stat().st_mtime_ns, p.name))

    def _delete(self, folder: Path) -> None:
        """Rename before deleting: half a checkpoint must not look like one."""
        doomed = folder.with_name(folder.name + ".old" + SCRAP)
        folder.rename(doomed)
        shutil.rmtree(doomed)

    def _index(self) -> dict[str, Any]:
        path = self.directory / INDEX
        return dict(json.loads(path.read_text())) if path.is_file() else {}


def write_atomic(path: Path, content: Mapping[str, Any] | bytes) -> None:
    """Write bytes, or `torch.save` a mapping, so that `path` is at all times absent, old or complete."""
    scrap = path.with_name(path.name + SCRAP)
    with scrap.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    scrap.replace(path)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by `path`: itself (a folder or an exported file), or the latest of a run.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_file() or (path / MANIFEST).is_file():
        return path
    for directory in (path, path / "checkpoints"):
        if directory.is_dir() and (found := CheckpointStore(directory, 1).latest()):
            return found
    raise CheckpointError(f"there is no checkpoint at {path}")
