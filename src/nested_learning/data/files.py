"""Files that a path, a folder or a pattern stands for, in training, mixtures and evaluation alike.

A name that exists is that file or folder, whatever characters it holds. Otherwise every part of it is a
pattern: `*`, `?`, `[abc]`, and `**` for any number of folders. Links are followed, and every real file or
folder is taken once, so that neither a cycle of links nor a second link to a text repeats anything.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TEXT_ENDINGS = (".txt", ".md", ".rst")
COMPRESSIONS = ("", ".gz", ".zst")

DROPPINGS = ("thumbs.db", "desktop.ini", "__macosx")
"""Files that operating systems leave in folders, besides hidden ones, in lower case."""

HIDDEN = "hidden or system file"
SHOWN = 3
"""File names that are listed per reason."""


@dataclass(kw_only=True, slots=True)
class Listing:
    """The files that were found.

    Args:
        files: to read, sorted.
        left_out: reason → paths that were not taken.
    """

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: Path) -> None:
        """Record that `path` is not taken."""
        self.left_out.setdefault(reason, []).append(path)

    def describe(self) -> str:
        """One line: `3 files; left out: broken link 1 (b.txt), hidden or system file 1 (._a.txt)`."""
        parts = []
        for reason, paths in sorted(self.left_out.items()):
            names = ", ".join(path.name for path in paths[:SHOWN]) + (", …" if len(paths) > SHOWN else "")
            parts.append(f"{reason} {len(paths)} ({names})")
        count = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        return "; left out: ".join([count, *([", ".join(parts)] if parts else [])])


def find_files(name: str | Path, endings: Sequence[str] = (), deep: bool = True) -> Listing:
    """The files that `name` stands for: a file, a folder or a pattern.

    Hidden files, files left by systems and editors, empty files, broken links and second links to a file are
    not taken, and listed as left out.

    Args:
        name: a file is taken as it is, of a folder all files with one of `endings` in upper or lower case,
            and of a pattern all files that match.
        endings: such as `(".txt", ".txt.gz")`; empty = every file.
        deep: also look into the folders inside a folder.

    Raises:
        FileNotFoundError: nothing has that name, or it is a broken link.
        PermissionError: a folder may not be read.
    """
    path = Path(name).expanduser()
    found = Listing()
    if path.is_file():
        found.files = [path]
        return found
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    seen: set[tuple[int, int]] = set()
    if path.is_dir():
        for entry in _walk(path, seen, found, deep):
            _take(entry, tuple(ending.lower() for ending in endings), seen, found)
    elif path.exists():
        raise FileNotFoundError(f"{path} is neither a file nor a folder")
    else:
        root = Path(path.anchor)
        for entry in _match(root, path.parts[1:] if path.anchor else path.parts, found):
            if entry.is_dir():
                found.leave_out("folder", entry)
            else:
                _take(entry, (), seen, found)
    found.files.sort()
    return found


def no_file(kind: str, name: str | Path, found: Listing) -> FileNotFoundError:
    """The error for a name that stands for no file of a kind, such as "text"."""
    why = ""
    if found.left_out:
        why = f" ({found.describe()})"
    elif "[" in str(name):
        why = " ([ ] in a pattern stand for one character; [[] stands for a bracket)"
    return FileNotFoundError(f"no {kind} file at {name}{why}")


def is_dropping(name: str) -> bool:
    """Whether a file or folder of that name is hidden, a backup, or left by an operating system."""
    return name.startswith((".", "#", "~$")) or name.endswith("~") or name.lower() in DROPPINGS


def _entries(folder: Path) -> list[Path]:
    return sorted(folder / entry.name for entry in os.scandir(folder))


def _walk(folder: Path, seen: set[tuple[int, int]], found: Listing, deep: bool) -> Iterator[Path]:
    """Everything below a folder that is not itself a folder."""
    if not _first(folder, seen):
        found.leave_out("same folder again", folder)
        return
    for entry in _entries(folder):
        if not entry.is_dir():
            yield entry
        elif is_dropping(entry.name):
            found.leave_out(HIDDEN, entry)
        elif deep:
            yield from _walk(entry, seen, found, deep)


def _match(folder: Path, parts: Sequence[str], found: Listing) -> Iterator[Path]:
    """The paths below `folder` that match a pattern, given as its parts."""
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if os.path.lexists(folder / part):
        yield from _match(folder / part, rest, found)
    elif not folder.is_dir():
        return
    elif part == "**":
        for below in _folders(folder, set()):
            yield from _match(below, rest, found)
    else:
        for entry in _entries(folder):
            if not fnmatch.fnmatchcase(entry.name, part):
                continue
            if is_dropping(entry.name) and part[0] not in ".#~":
                found.leave_out(HIDDEN, entry)
            else:
                yield from _match(entry, rest, found)


def _folders(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """A folder and all folders below it."""
    if _first(folder, seen):
        yield folder
        for entry in _entries(folder):
            if entry.is_dir() and not is_dropping(entry.name):
                yield from _folders(entry, seen)


def _take(path: Path, endings: tuple[str, ...], seen: set[tuple[int, int]], found: Listing) -> None:
    """Add `path` to the files of `found`, or to those left out."""
    if is_dropping(path.name):
        found.leave_out(HIDDEN, path)
    elif endings and not path.name.lower().endswith(endings):
        found.leave_out("other ending", path)
    elif not path.exists():
        found.leave_out("broken link", path)
    elif not path.is_file():
        found.leave_out("not a file", path)
    elif not path.stat().st_size:
        found.leave_out("empty", path)
    elif not _first(path, seen):
        found.leave_out("same file again", path)
    else:
        found.files.append(path)


def _first(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether this real file or folder is seen for the first time; links count as their target."""
    status = path.stat()
    key = (status.st_dev, status.st_ino)
    new = key not in seen
    seen.add(key)
    return new
