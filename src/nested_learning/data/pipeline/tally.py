"""Counts of the records of a source, and whether enough of them could be read."""

from __future__ import annotations

from dataclasses import dataclass, field

from nested_learning.data.config import SourceConfig
from nested_learning.data.pipeline.sources import Document, Item, Problem, UnusableSourceError, source_bytes

UNREADABLE = ("bad_utf8", "bad_json", "missing_text", "wrong_type", "too_large")
"""Kinds of problems of records that do not hold text. An empty record is not one of them."""

MOST_UNREADABLE = 0.1
"""A source is refused if more than this share of its records or bytes cannot be read."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts over the records of a source.

    Args:
        read: records read.
        dropped: reason → number of records that are not kept.
        examples: reason → the first message.
        lost: bytes of files that were left out because they are corrupt.
    """

    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    lost: int = 0

    def drop(self, reason: str, message: str | None = None) -> bool:
        """Count a document that is not kept, and return whether it is the first for this reason."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if message is not None:
            self.examples.setdefault(reason, message)
        return self.dropped[reason] == 1

    def add_problem(self, problem: Problem) -> bool:
        """Count a problem, and return whether it is the first of its kind."""
        self.read += problem.kind != "corrupt_file"
        self.lost += problem.lost
        return self.drop(problem.kind, problem.message)

    def add(self, item: Item) -> None:
        """Count an item of `read_source`."""
        if isinstance(item, Document):
            self.read += 1
        else:
            self.add_problem(item)

    def check(self, source: SourceConfig) -> None:
        """Check the counts of a source that was read to its end.

        Raises:
            UnusableSourceError: no record is usable, or too many cannot be read.
        """
        unreadable = sum(self.dropped.get(kind, 0) for kind in UNREADABLE)
        total = source_bytes(source)
        if self.read == unreadable + self.dropped.get("empty", 0):
            wrong = f"none of its {self.read} records is usable"
        elif unreadable > MOST_UNREADABLE * self.read:
            wrong = f"{unreadable} of its {self.read} records cannot be read"
        elif total is not None and self.lost > MOST_UNREADABLE * total:
            wrong = f"{self.lost} of its {total} bytes are in corrupt files"
        else:
            return
        kinds = [kind for kind in (*UNREADABLE, "corrupt_file", "empty") if kind in self.dropped]
        counts = ", ".join(f"{kind} {self.dropped[kind]}" for kind in kinds)
        first = f" ({counts}), the first: {self.examples[kinds[0]]}" if kinds else ""
        raise UnusableSourceError(f"source {source.name}: {wrong}{first}")
