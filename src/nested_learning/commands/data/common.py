"""What the commands of `nl data` share: a log file, options and the mixture that they select."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from nested_learning.data.config import MixtureConfig


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Add `--limit` and `--fallback-split`, which `with_limits` applies."""
    limit = "read at most so many records"
    parser.add_argument("--limit", nargs="+", default=[], metavar="NAME=RECORDS", help=limit)
    parser.add_argument("--fallback-split", help="split of hub data sets that lack the wanted one")


def file_log(path: Path | None) -> Callable[[str], None]:
    """A function that prints a line above the progress bar and appends it, with the time, to a file.

    Args:
        path: of the file; None only prints.
    """

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
    """The mixture with limits on its sources and a fallback split for hub sources that name none.

    Args:
        mixture: that of a configuration.
        limits: texts such as "wikipedia=1000", a source and its number of records.
        fallback_split: of hub sources without one of their own.

    Raises:
        ValueError: no mixture, an unknown source, or a limit that is not a whole number.
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


def print_problems(problems: Sequence[str]) -> int:
    """Print the problems, or that there are none, and return the exit status: 1 if there are any."""
    print("\n".join(["problems:", *problems]) if problems else "all good")
    return 1 if problems else 0
