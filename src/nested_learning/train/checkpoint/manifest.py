"""Size and SHA-256 of every file of a checkpoint, so that damage is found before it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nested_learning.train.checkpoint.errors import CheckpointError

MANIFEST = "manifest.json"
READERS = 8  # files hashed at once; hashing leaves the interpreter lock to others
BLOCK = 1 << 20


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


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a checkpoint's files, a line each; empty if all is as it was written.

    Raises:
        CheckpointError: no manifest, or an unreadable one.
    """
    folder = Path(folder)
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} has no readable {MANIFEST}: {error}") from error
    present = _names(folder)
    problems = [f"{name} is missing" for name in entries if name not in present]
    problems += [f"{name} is not of this checkpoint" for name in present if name not in entries]
    whole = []
    for name in (name for name in entries if name in present):
        size, wanted = (folder / name).stat().st_size, entries[name]["bytes"]
        if size != wanted:
            problems.append(f"{name} has {size} bytes, was written with {wanted}")
        else:
            whole.append(name)
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(_sha256, (folder / name for name in whole))
    problems += [
        f"{name} does not match its checksum"
        for name, digest in zip(whole, digests, strict=True)
        if digest != entries[name]["sha256"]
    ]
    return sorted(problems)


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in files if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
