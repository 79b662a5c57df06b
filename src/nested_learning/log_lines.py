"""Reading logs that a program appends to, a JSON object a line, whatever befell the program or the disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_log(path: Path, valid: Callable[[Row], bool] = lambda row: True) -> tuple[list[Row], bool]:
    """Rows of a log, oldest first; none if there is no file.

    A last line without its end was cut off by a kill and is left out. So are damaged lines, which is said on
    stderr: no JSON object, or one that is not `valid`.

    Returns:
        The rows, and whether they are all that the file holds.
    """
    if not path.exists():
        return [], True
    *lines, tail = path.read_bytes().split(b"\n")
    rows, damaged = [], []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None and valid(row):
            rows.append(row)
        else:
            damaged.append(number)
    if damaged:
        many = f"{len(damaged)} damaged lines are" if len(damaged) > 1 else "a damaged line is"
        print(f"{path}: {many} left out (line {damaged[0]})", file=sys.stderr)
    return rows, not (damaged or tail)


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:  # of UTF-8 or JSON
        return None
    return row if isinstance(row, dict) else None
