"""Writes shards so that a run that is killed at any moment neither loses nor duplicates a document.

Files grow by appending under a name that ends in `.part`. `commit` first makes their content durable, then
replaces `progress.json`, which holds the length of each file, and only then gives finished shards their final
name. Opening the folder again truncates every file to its committed length, so that a resumed run writes the
same bytes as one that was never interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nested_learning.data.pipeline.dedup import KeySet, UIntArray
from nested_learning.data.pipeline.sources import START, Place
from nested_learning.data.pipeline.tally import Tally
from nested_learning.data.records import read_json
from nested_learning.data.shards import DIGEST_BYTES, MANIFEST, SPLITS, TokenArray, shard_file
from nested_learning.lock import LOCK, acquire

PROGRESS = "progress.json"
KEYS = "near.keys"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(OSError):
    """The disk is full. Nothing that was committed is lost."""


class OtherSettingsError(ValueError):
    """The folder was begun with other settings."""


@dataclass(kw_only=True, slots=True)
class SplitCounts:
    """Tokens, documents and UTF-8 bytes written to a split so far."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0


@dataclass(kw_only=True, slots=True)
class SourceProgress(Tally):
    """How much of a source has been processed.

    Args:
        place: the position from which reading resumes.
        consumed: bytes read.
        splits: counts by split.
        seconds: time spent on it, over all runs.
        done: nothing is left to read.
    """

    place: Place = START
    consumed: int = 0
    splits: dict[str, SplitCounts] = field(default_factory=lambda: {name: SplitCounts() for name in SPLITS})
    seconds: float = 0.0
    done: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        counts = {
            n: {"tokens": s.tokens, "documents": s.documents, "bytes": s.bytes}
            for n, s in self.splits.items()
        }
        plain = {
            name: getattr(self, name)
            for name in ("read", "consumed", "dropped", "examples", "lost", "seconds", "done")
        }
        return plain | {"place": list(self.place), "splits": counts}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SourceProgress:
        """Inverse of `to_dict`."""
        splits = {name: SplitCounts(**counts) for name, counts in values["splits"].items()}
        return cls(**(values | {"place": Place(*values["place"]), "splits": splits}))


class ShardStore:
    """A folder of shards that one process writes; see the top of the file.

    `sources` maps names to progress; `exact` and `near` hold keys of the documents kept so far, over all
    sources.

    Args:
        folder: made if it does not exist, and resumed if it was begun before.
        settings: everything that decides the content, as plain JSON values.
        dtype: of the tokens.
        shard_tokens: tokens of a shard.

    Raises:
        OtherSettingsError: the folder was begun with other settings.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], dtype: np.dtype[Any], shard_tokens: int
    ) -> None:
        self.folder, self._settings, self._dtype, self._shard_tokens = folder, settings, dtype, shard_tokens
        self.sources: dict[str, SourceProgress] = {}
        self.exact, self.near = KeySet(), KeySet()
        self._near_count = 0
        self._files: dict[Path, BinaryIO] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = acquire(folder / LOCK, f"folder {folder}", forked=False)
        if (folder / PROGRESS).is_file():
            saved = read_json(folder / PROGRESS)
            check_settings(saved["settings"], settings, folder)
            self.sources = {name: SourceProgress.from_dict(v) for name, v in saved["sources"].items()}
            self._near_count = saved["near_keys"]
        self._recover()

    def append(self, name: str, split: str, tokens: TokenArray, digest: bytes, num_bytes: int) -> None:
        """Append a document to a split.

        Args:
            name: of the source.
            split: one of `SPLITS`.
            tokens: `[N]`, with the end token.
            digest: of its text.
            num_bytes: UTF-8 bytes of its text.

        Raises:
            DiskFullError: the disk is full.
        """
        counts = self.sources[name].splits[split]
        with _room(self.folder):
            starts, hashes = (self._file(path) for path in self._index_files(name, split))
            starts.write(np.asarray([counts.tokens], "<u8").tobytes())
            hashes.write(digest)
            while len(tokens):
                number, used = divmod(counts.tokens, self._shard_tokens)
                now = tokens[: self._shard_tokens - used]
                self._file(_part(shard_file(self.folder / name, split, number))).write(now.tobytes())
                counts.tokens += len(now)
                tokens = tokens[len(now) :]
        counts.documents += 1
        counts.bytes += num_bytes

    def append_keys(self, keys: UIntArray) -> None:
        """Append the band keys of a document that is kept.

        Raises:
            DiskFullError: the disk is full.
        """
        self.near.add(keys)
        self._near_count += len(keys)
        with _room(self.folder):
            self._file(self.folder / KEYS).write(keys.astype("<u8").tobytes())

    def commit(self) -> None:
        """Make everything that was appended durable.

        Raises:
            DiskFullError: the disk is full.
        """
        with _room(self.folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            saved = {name: progress.to_dict() for name, progress in self.sources.items()}
            content = {"settings": self._settings, "sources": saved, "near_keys": self._near_count}
            write_json(self.folder / PROGRESS, content)
        self._name_finished()

    def complete(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, which makes the folder complete, and delete files that only resuming needs.

        Raises:
            DiskFullError: the disk is full.
        """
        with _room(self.folder):
            write_json(self.folder / MANIFEST, manifest)
        self.close()
        (self.folder / KEYS).unlink(missing_ok=True)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        (self.folder / LOCK).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files and release the lock. What was not committed is lost."""
        self._lock.close()
        for file in self._files.values():
            try:
                file.close()
            except OSError as error:  # the disk is full when the buffer is written
                if error.errno not in FULL:
                    raise
        self._files = {}

    def _recover(self) -> None:
        """Restore the state of the last commit."""
        for path in self.folder.glob("*/*.part"):
            if path.parent.name not in self.sources:
                path.unlink()
        for name, progress in self.sources.items():
            for split, counts in progress.splits.items():
                self._recover_split(name, split, counts, progress.done)
        self._trim(self.folder / KEYS, 8 * self._near_count)
        if self._near_count:
            self.near.add(np.fromfile(self.folder / KEYS, "<u8"))
        for name in self.sources:
            for split in SPLITS:
                self._load_hashes(name, split)
        self._name_finished()

    def _recover_split(self, name: str, split: str, counts: SplitCounts, done: bool) -> None:
        folder, width = self.folder / name, self._dtype.itemsize
        for path, size in zip(self._index_files(name, split), (8, DIGEST_BYTES), strict=True):
            if path.exists() or not done:
                self._trim(path, size * counts.documents)
        full, rest = divmod(counts.tokens, self._shard_tokens)
        if rest and not (done and shard_file(folder, split, full).exists()):
            self._trim(_part(shard_file(folder, split, full)), width * rest)
        for path in folder.glob(f"{split}-*.bin.part"):
            number = int(path.name.removeprefix(f"{split}-").removesuffix(".bin.part"))
            if number < full:
                self._trim(path, width * self._shard_tokens)
            elif number > full or not rest:
                path.unlink()

    def _load_hashes(self, name: str, split: str) -> None:
        path = self._index_files(name, split)[1]
        path = path if path.exists() else _final(path)
        if path.exists() and path.stat().st_size:
            digests = np.fromfile(path, np.uint8).reshape(-1, DIGEST_BYTES)
            self.exact.add(np.ascontiguousarray(digests[:, :8]).view("<u8")[:, 0])

    def _name_finished(self) -> None:
        """Rename finished shards, and all files of finished sources, to their final names."""
        for name, progress in self.sources.items():
            for split, counts in progress.splits.items():
                full, rest = divmod(counts.tokens, self._shard_tokens)
                finished = full + bool(progress.done and rest)
                paths = [_part(shard_file(self.folder / name, split, n)) for n in range(finished)]
                for path in [*paths, *(self._index_files(name, split) if progress.done else [])]:
                    if file := self._files.pop(path, None):
                        file.close()
                    if path.exists():
                        path.rename(_final(path))

    def _trim(self, path: Path, size: int) -> None:
        """Truncate a file to its committed size, or delete it if that is 0.

        Raises:
            ValueError: it is shorter.
        """
        if not size:
            path.unlink(missing_ok=True)
            return
        with path.open("ab") as file:
            if file.tell() < size:
                raise ValueError(f"{path} has {file.tell()} bytes, fewer than the {size} that were committed")
            file.truncate(size)

    def _file(self, path: Path) -> BinaryIO:
        if path not in self._files:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[path] = path.open("ab")
        return self._files[path]

    def _index_files(self, name: str, split: str) -> tuple[Path, Path]:
        folder = self.folder / name
        return _part(folder / f"{split}.starts"), _part(folder / f"{split}.hashes")


def write_json(path: Path, content: Any) -> None:
    """Write `path` atomically."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def clear_folder(folder: Path) -> None:
    """Delete a folder of shards, complete or not.

    Raises:
        ValueError: it holds other files and no shards.
    """
    if not folder.is_dir():
        return
    if any(folder.iterdir()) and not any((folder / name).is_file() for name in (MANIFEST, PROGRESS)):
        raise ValueError(f"{folder} is not empty and holds no shards; give another folder")
    shutil.rmtree(folder)


def check_settings(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Check that `folder` was begun with the settings `new`.

    Raises:
        OtherSettingsError: the settings differ; the message names every difference.
    """
    differing = [
        f"{key} is {new.get(key)!r}, was {old.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise OtherSettingsError(
            f"{folder} was begun with other settings: {'; '.join(differing)[:500]}; "
            "use another folder, or --overwrite to start anew"
        )


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(
                error.errno,
                f"no room to write in {folder} ({error.strerror}); make some and run the same "
                "command again: it goes on from the last saved place",
            ) from error
        raise


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _final(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".part"))
