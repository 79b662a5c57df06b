"""Which files are meant by a file, a folder or a pattern: one answer for training, mixtures and evaluation.

A name that exists is that file or folder, whatever characters it holds. Otherwise it is a pattern, part by
part: `*`, `?`, `[abc]`, and `**` for any number of folders. Links are followed, and every real file or folder
is taken once, so that neither a cycle of links nor a second link to a text repeats anything.
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
"""What systems leave in folders besides hidden files, in lower case."""

HIDDEN = "hidden or system file"
SHOWN = 3
"""Names of a reason that are listed."""


@dataclass(kw_only=True, slots=True)
class Listing:
    """What was found: the files to read, sorted, and what was left out, by reason."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: Path) -> None:
        """Note that `path` is not taken."""
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
    """The files meant by `name`: a file, a folder or a pattern.

    Args:
        name: a file is taken as it is; of a folder, all files with one of `endings`, in any case of letters;
            of a pattern, all files that match. Hidden files, droppings of systems and editors, empty files,
            broken links and second links to a file are left out, and listed as such.
        endings: such as `(".txt", ".txt.gz")`; empty = every file.
        deep: look into folders inside a folder.

    Raises:
        FileNotFoundError: there is nothing of that name, or a link that leads nowhere.
        PermissionError: a folder that may not be read.
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
    """The error for a name that means no file of a kind, such as "text"."""
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
    """What below `folder` matches a pattern, given in its parts."""
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
    """A folder and all below it."""
    if _first(folder, seen):
        yield folder
        for entry in _entries(folder):
            if entry.is_dir() and not is_dropping(entry.name):
                yield from _folders(entry, seen)


def _take(path: Path, endings: tuple[str, ...], seen: set[tuple[int, int]], found: Listing) -> None:
    """Put `path` where it belongs in `found`."""
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
    """Whether this real file or folder is met for the first time."""
    status = path.stat()
    key = (status.st_dev, status.st_ino)
    new = key not in seen
    seen.add(key)
    return new
