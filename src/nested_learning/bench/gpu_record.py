"""What the benchmark on a card has measured, kept on disk after every measurement; the time it has left."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nested_learning.train.checkpoint.store import write_atomic

Entry = dict[str, Any]
FINAL = ("done", "failed")
"""States of an entry that a later call keeps; the others are looked at again."""

TRIES = 2
"""Processes that may end in a measurement before it is given up."""


class Record:
    """Results by key in a JSON file, each with its `status`.

    That is "done", "failed", "skipped" for want of time, "absent" (a package is not installed), "unchecked"
    (its kernel is not known to be right) or "begun". All but the first say `why`.

    Args:
        path: the file; what it holds already is kept.
        about: settings, machine and code, which must be those of the file.

    Raises:
        ValueError: the file holds results of something else.
    """

    def __init__(self, path: Path, about: Entry) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.about: Entry = json.loads(json.dumps(about))
        if path.is_file():
            held = json.loads(path.read_text())
            differing = [key for key, value in self.about.items() if held["about"].get(key) != value]
            if differing:
                raise ValueError(
                    f"{path} holds results with other {', '.join(differing)}; give another --output, "
                    "or --again"
                )
            self.entries = held["entries"]

    def has(self, key: str) -> bool:
        """Whether `key` needs no measurement any more."""
        return self.entries.get(key, {}).get("status") in FINAL

    def put(self, key: str, status: str, **values: Any) -> Entry:
        """Keep a result and write the file."""
        entry = {"status": status, **values}
        self.entries[key] = entry
        self.save()
        return entry

    def begin(self, key: str, **about: Any) -> bool:
        """Note that `key` is being measured; False, and it has failed, if two processes have ended in it."""
        times = self.entries.get(key, {}).get("times", 0) + 1
        status = "failed" if times > TRIES else "begun"
        self.put(key, status, **about, why="the process ended in it", times=times)
        return status == "begun"

    def forget(self, key: str) -> None:
        """Take `key` out again: a person has stopped its measurement."""
        del self.entries[key]
        self.save()

    def done(self, key: str) -> Entry | None:
        """The result of `key`, if it was measured."""
        entry = self.entries.get(key)
        return entry if entry is not None and entry["status"] == "done" else None

    def of(self, kind: str) -> list[Entry]:
        """All entries of a kind, which begins their keys."""
        return [entry for key, entry in self.entries.items() if key.split()[0] == kind]

    def save(self) -> None:
        """Write the file; it is at all times absent, old or complete."""
        text = json.dumps({"about": self.about, "entries": self.entries}, indent=1) + "\n"
        write_atomic(self.path, text.encode())


class Budget:
    """Seconds that may be spent from now on.

    Args:
        seconds: how many.
        clock: a clock in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.end = clock, clock() + seconds

    def left(self) -> float:
        """Seconds that are left, 0 or more."""
        return max(0.0, self.end - self.clock())

    def fits(self, seconds: float) -> bool:
        """Whether something of this length may begin."""
        return self.left() > seconds


def code_fingerprint() -> str:
    """A hash of the library's source, which says whether results belong to it."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]
