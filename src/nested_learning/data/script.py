"""What the command lines in `scripts/data/` share: a log file, limits by source, errors as one line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from nested_learning.data.config import MixtureConfig
from nested_learning.data.sources import UnusableSourceError


def file_log(path: Path | None) -> Callable[[str], None]:
    """A function that prints a line (above a progress bar) and appends it, with the time, to a file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        tqdm.write(line)
        if path is not None:
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


def run_script(main: Callable[[], int | None]) -> None:
    """Exit with what `main` returns; with one line and 1 for a source that was read and does not hold what it
    should, 2 for other input that cannot be used, 130 after Ctrl-C."""
    try:
        code = main() or 0
    except UnusableSourceError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        code = 1
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last saved place", file=sys.stderr)
        code = 130
    sys.exit(code)
