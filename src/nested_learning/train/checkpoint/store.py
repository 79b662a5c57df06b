"""The checkpoints of one run on disk: the latest, the best, the undamaged, and those to delete."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nested_learning.checks import near_path
from nested_learning.train.checkpoint.errors import CheckpointError, note
from nested_learning.train.checkpoint.manifest import MANIFEST, foreign, read_manifest, verify, write_manifest
from nested_learning.train.checkpoint.run_file import METADATA, RUN, read_run
from nested_learning.train.checkpoint.tensors import nonfinite_weights

INDEX = "index.json"
SCRAP = ".tmp"
NAME = re.compile(r"step_\d{8,}")
FIRST_FORMAT = "step_*.pt"  # a checkpoint was one file


class CheckpointStore:
    """The checkpoints of one run. Keeps the newest `keep_last` and the one with the lowest validation loss.

    A checkpoint is written into `step_….tmp`, gets its manifest, and is renamed, so a kill at any time leaves
    the former ones whole. One process of a run commits and deletes; all may ask for the latest. `index.json`
    names the latest and the best; if it cannot be read, it is rebuilt from the checkpoints.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory = directory
        self.keep_last = keep_last

    def clean(self) -> None:
        """Make the directory, and delete incomplete checkpoints of a killed process.

        Raises:
            CheckpointError: it cannot be made or written to.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for scrap in self.directory.glob(f"*{SCRAP}"):
                shutil.rmtree(scrap) if scrap.is_dir() else scrap.unlink()
        except OSError as error:
            raise CheckpointError(f"cannot keep checkpoints in {self.directory}: {error}") from error
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise CheckpointError(f"cannot keep checkpoints in {self.directory}: no permission to write")

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
        """The newest checkpoint, None if there is none. It may be damaged; see `newest_whole`."""
        return next(iter(self.newest_first()), None)

    def newest_first(self) -> list[Path]:
        """All checkpoints, the one that the index calls the latest before the others."""
        latest = self._index().get("latest")
        return sorted(reversed(self.folders()), key=lambda folder: folder.name != latest)

    def newest_whole(self) -> Path | None:
        """The newest checkpoint that a run can resume from; None if there are no checkpoints.

        If that is not the latest, stderr says what is wrong with the latest.

        Raises:
            CheckpointError: there are checkpoints, but a run cannot resume from any of them.
        """
        problem: str | None = None
        for folder in self.newest_first():
            if (found := unfit(folder)) is None:
                if problem is not None:
                    note(f"{problem}; going back to {folder}")
                return folder
            problem = problem or found
        if problem is not None:
            raise CheckpointError(f"{problem}; no other is whole; train.resume=null starts anew")
        self.refuse_first_format()
        return None

    def refuse_first_format(self) -> None:
        """Raise CheckpointError if there are checkpoints that a former release wrote as single files."""
        if old := sorted(self.directory.glob(FIRST_FORMAT)):
            raise CheckpointError(
                f"{old[-1]} is a checkpoint of format 1, which this code does not read; train.resume=null "
                "starts anew, another name= keeps both"
            )

    def best(self) -> Path | None:
        """The checkpoint with the lowest validation loss, None if none was validated."""
        name = self._index().get("best")
        return self.directory / name if name and (self.directory / name / MANIFEST).is_file() else None

    def clear(self) -> None:
        """Delete all checkpoints."""
        (self.directory / INDEX).unlink(missing_ok=True)
        for old in [*self.folders(), *self.directory.glob(FIRST_FORMAT)]:
            self._delete(old)

    def folders(self) -> list[Path]:
        """All checkpoint folders, oldest first by time, because a run may have returned to an earlier
        step."""
        found = [p for p in self.directory.glob("step_*") if NAME.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=lambda p: (_written(p), p.name))

    def _delete(self, old: Path) -> None:
        """Delete a checkpoint. It is renamed first, so that a partly deleted one is not taken for a
        checkpoint."""
        doomed = old.with_name(old.name + ".old" + SCRAP)
        old.rename(doomed)
        shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()

    def _index(self) -> dict[str, Any]:
        """The content of `index.json`, rebuilt from the checkpoints if it is missing or not valid."""
        try:
            index = json.loads((self.directory / INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return self._rebuilt_index()
        return index if _is_index(index) else self._rebuilt_index()

    def _rebuilt_index(self) -> dict[str, Any]:
        losses: dict[str, float] = {}
        for folder in self.folders():
            try:
                loss = read_run(folder)["metrics"].get("valid_loss")
            except CheckpointError:
                continue
            if _is_loss(loss):
                losses[folder.name] = loss
        if not losses:
            return {}
        best = min(losses, key=losses.__getitem__)
        return {"best": best, "best_loss": losses[best]}


def unfit(folder: Path) -> str | None:
    """Why a run cannot resume from a checkpoint folder, in one line; None if it can."""
    try:
        if problem := damage(folder):
            return problem
        read_run(folder)
        names = nonfinite_weights(folder)
    except CheckpointError as error:
        return str(error)
    return f"checkpoint {folder} has weights that are not finite, such as {names[0]}" if names else None


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint folder, in one line; None if they are as written.

    Files that do not belong to the checkpoint are named on stderr.
    """
    try:
        problems = [f"{name} is missing" for name in (RUN, METADATA) if name not in read_manifest(folder)]
        if problems := problems or verify(folder):
            return f"checkpoint {folder} is corrupt: {'; '.join(problems)}"
        if strangers := foreign(folder):
            note(f"in checkpoint {folder}, not of it and left alone: {', '.join(strangers)}")
    except CheckpointError as error:
        return str(error)
    return None


def other_whole(folder: Path) -> Path | None:
    """The newest checkpoint beside `folder` that a run can resume from."""
    others = CheckpointStore(folder.parent, 1).newest_first()
    return next((other for other in others if other.name != folder.name and unfit(other) is None), None)


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
        CheckpointError: there is no checkpoint, or `path` is a file in a checkpoint folder.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors" and (folder := _folder_of(path)):
            raise CheckpointError(f"{path} is a part of a checkpoint; give its folder, {folder}")
        return path
    if (path / MANIFEST).is_file() or (path / RUN).is_file():
        return path
    for directory in (path, path / "checkpoints"):
        store = CheckpointStore(directory, 1)
        if found := store.latest():
            return found
        store.refuse_first_format()
    raise CheckpointError(f"there is no checkpoint at {path}{near_path(path)}")


def _folder_of(file: Path) -> Path | None:
    """The checkpoint folder, or the folder of a run's checkpoints, that holds a file."""
    for folder in file.absolute().parents:
        if NAME.fullmatch(folder.name) or (folder / RUN).is_file():
            return folder
    return file.parent if file.name == INDEX else None


def _written(folder: Path) -> int:
    manifest = folder / MANIFEST
    return (manifest if manifest.is_file() else folder).stat().st_mtime_ns


def _is_index(index: Any) -> bool:
    if not isinstance(index, dict):
        return False
    names = [index[key] for key in ("latest", "best") if key in index]
    if not all(isinstance(name, str) and NAME.fullmatch(name) for name in names):
        return False
    return "best" not in index or _is_loss(index.get("best_loss"))


def _is_loss(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
