"""Size and SHA-256 of every file of a checkpoint, so that damage is found before it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nested_learning.train.checkpoint.errors import CheckpointError

MANIFEST = "manifest.json"
READERS = 8  # files hashed at once; hashing leaves the interpreter lock to others
BLOCK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as it was written."""

    size: int
    sha256: str


def write_manifest(folder: Path) -> None:
    """Write `manifest.json` over all files that are in `folder` now."""
    names = _names(folder)
    with ThreadPoolExecutor(READERS) as pool:
        digests = list(pool.map(_sha256, (folder / name for name in names)))
    entries = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"files": entries}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The files of a checkpoint by name.

    Raises:
        CheckpointError: no manifest, an unreadable one, or one with an entry that describes no file in it.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: _entry(name, value) for name, value in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint {folder} has no readable {MANIFEST}: {type(error).__name__}: {error}"
        ) from error


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a checkpoint's files, a line each; empty if all is as it was written.

    Files that the manifest does not name are not of the checkpoint and do not matter; see `foreign`.

    Raises:
        CheckpointError: no manifest, or an unreadable one.
    """
    folder = Path(folder)
    entries = read_manifest(folder)
    problems, whole = [], []
    for name, entry in entries.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            problems.append(f"{name} is missing")
        elif size != entry.size:
            problems.append(f"{name} has {size} bytes, was written with {entry.size}")
        else:
            whole.append(name)
    try:
        with ThreadPoolExecutor(READERS) as pool:
            digests = list(pool.map(_sha256, (folder / name for name in whole)))
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from error
    problems += [
        f"{name} does not match its checksum"
        for name, digest in zip(whole, digests, strict=True)
        if digest != entries[name].sha256
    ]
    return sorted(problems)


def foreign(folder: str | Path) -> list[str]:
    """Files in a checkpoint folder that do not belong to it, such as those of a file manager. They are not
    read.

    Raises:
        CheckpointError: no manifest, or an unreadable one.
    """
    folder = Path(folder)
    own = read_manifest(folder)
    return [name for name in _names(folder) if name not in own]


def _entry(name: str, value: Any) -> Entry:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or "\\" in name or name == ".":
        raise ValueError(f"{name!r} is not the name of a file in it")
    size, sha256 = value["bytes"], value["sha256"]
    if type(size) is not int or size < 0:
        raise ValueError(f"bytes of {name} must be an integer of at least 0, got {size!r}")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"sha256 of {name} must be 64 hexadecimal digits, got {sha256!r}")
    return Entry(size, sha256)


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in files if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
