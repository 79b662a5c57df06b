"""What the command lines in `scripts/data/` share: a log file, limits by source."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from nested_learning.data.config import MixtureConfig


def file_log(path: Path | None) -> Callable[[str], None]:
    """A function that prints a line (above a progress bar) and appends it, with the time, to a file."""

    def log(line: str) -> None:
        tqdm.write(line)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n")

    return log


def with_limits(
    mixture: MixtureConfig | None, limits: Sequence[str], fallback_split: str | None = None
) -> MixtureConfig:
    """The mixture with `NAME=RECORDS` limits, and a fallback split for hub sources that name none.

    Raises ValueError for no mixture, an unknown name or something that is not a number.
    """
    if mixture is None:
        raise ValueError("this configuration has no `mixture`; take one such as configs/data/sample.yaml")
    wanted: dict[str, int] = {}
    for limit in limits:
        name, _, number = limit.partition("=")
        if not number.isdigit():
            raise ValueError(f"--limit must be NAME=RECORDS, got {limit!r}")
        wanted[name] = int(number)
    names = [source.name for source in mixture.sources]
    if unknown := sorted(wanted.keys() - set(names)):
        raise ValueError(f"--limit {unknown[0]}: no such source; there are {', '.join(names)}")
    sources = [
        replace(
            source,
            limit=wanted.get(source.name, source.limit),
            fallback_split=source.fallback_split or (fallback_split if source.kind == "hub" else None),
        )
        for source in mixture.sources
    ]
    return replace(mixture, sources=tuple(sources))
