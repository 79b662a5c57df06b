"""Result files of `nl eval` that belong to the checkpoints of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nested_learning.eval.loading import OUTPUT
from nested_learning.eval.results import EvaluationResult, read_result
from nested_learning.reporting.run import RunRecord
from nested_learning.train.checkpoint.manifest import MANIFEST

FOLDERS = (OUTPUT, Path("results"))
"""Where result files are looked for, besides the run directory itself: where `nl eval` puts them, and where
people do."""
MOST_FILES, MOST_BYTES = 2000, 5_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A result file, and the checkpoint that it is of: a name of a folder, or what is known of it."""

    path: Path
    checkpoint: str
    result: EvaluationResult


def find_evaluations(record: RunRecord, folders: Sequence[Path] = FOLDERS) -> list[Found]:
    """Result files of the checkpoints of a run, in the order of their paths.

    One belongs to the run if it names the SHA-256 of a checkpoint that is kept, or a path inside the run
    directory: then the checkpoint has been deleted or written again since.

    Args:
        record: the run.
        folders: searched with all folders below them, as is the run directory (without its checkpoints).
    """
    kept = {
        hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(): folder.name
        for folder in record.checkpoints
        if (folder / MANIFEST).is_file()
    }
    found = []
    for path in _candidates([record.path, *folders]):
        try:
            result = read_result(path)
        except (ValueError, TypeError, AttributeError, OSError):  # some other JSON file
            continue
        checkpoint = _checkpoint_of(result.checkpoint, kept, record.path.resolve())
        if checkpoint is not None:
            found.append(Found(path=path, checkpoint=checkpoint, result=result))
    return found


def _candidates(folders: Sequence[Path]) -> Iterator[Path]:
    """JSON files below `folders`, each once; at most so many and so large that a search takes no time."""
    seen: dict[Path, None] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            inside = path.relative_to(folder).parts
            if "checkpoints" not in inside and len(seen) < MOST_FILES and path.stat().st_size <= MOST_BYTES:
                seen.setdefault(path.resolve())
    yield from seen


def _checkpoint_of(named: Mapping[str, str], kept: Mapping[str, str], run: Path) -> str | None:
    """The checkpoint of this run that a result file names, or None.

    Args:
        named: of the file: "name", "path" and "sha256", or paths and their SHA-256.
        kept: SHA-256 → folder name of the checkpoints of the run.
        run: its directory, absolute.
    """
    ours = [kept[value] for value in named.values() if value in kept]
    if ours:
        return ", ".join(ours)
    paths = [named["path"]] if "path" in named else list(named)
    gone = [Path(path).name for path in paths if run in Path(path).resolve().parents]
    return f"{', '.join(gone)} (no longer kept as it was)" if gone else None
