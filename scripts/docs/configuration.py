"""docs/configuration.md, made of the dataclasses:  uv run python scripts/docs/configuration.py [--check]"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from inspect import getdoc
from pathlib import Path
from typing import Any, get_args, get_type_hints

from nested_learning.train.config import RunConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
BAR = "\\|"
TOP = (["field", "type", "default", "meaning"], ["---"] * 4)
HEAD = """\
# Configuration

Every field of a run, with its type and default, as the dataclasses have them; made by
`scripts/docs/configuration.py`. Any of them can be set on a command line (`optim.lr=1e-3`), in a file of
`configs/`, or as an override of `load_config`. Unknown names and values out of range are refused, with the
nearest name.

The entries of `configs/` set many of them: `train.py --cfg job` prints what a run would have. Groups
(`optim=muon`, `levels=cms`, `experiment=mixer_linear`, …) set several at once.
"""


def sentences(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of its bases say of its fields, in the part "Args:"."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found |= _own_sentences(getdoc(base) or "")
    return found


def _own_sentences(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    current: list[str] = []
    for line in text.partition("Args:\n")[2].splitlines():
        if start := re.match(r" {4}([\w, ]+): (.*)", line):
            current = [name.strip() for name in start[1].split(",")]
            found |= dict.fromkeys(current, start[2])
        elif line.startswith("        ") and current:
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        elif line.strip():
            break
    return found


def nested(hint: Any) -> type | None:
    """The dataclass in a type, be it the type itself, an element or an alternative."""
    return next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)  # type: ignore[arg-type]


def name_of(hint: Any) -> str:
    """A type in words that fit a table."""
    text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"[\w.]*\.(\w+)", r"\1", text).replace("NoneType", "None")


def default_of(field: Any) -> str:
    """A default as it would be written."""
    if field.default is not MISSING:
        return "null" if field.default is None else str(field.default)
    return "see below" if field.default_factory is not MISSING else "—"


def section(kind: type, prefix: str, title: str) -> str:
    """The table of a dataclass, and those of the dataclasses in it."""
    hints, said = get_type_hints(kind), sentences(kind)
    rows, below = [], []
    for field in fields(kind):
        inner = nested(hints[field.name])
        if inner is not None:
            below.append((inner, f"{prefix}{field.name}"))
        default = "see below" if inner else default_of(field)
        rows.append(
            [
                f"`{prefix}{field.name}`",
                f"`{name_of(hints[field.name])}`",
                f"`{default}`",
                said.get(field.name, ""),
            ]
        )
    table = (
        "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in [*TOP, *rows]) + "\n"
    )
    parts = [f"## {title}\n\n{table}"]
    parts += [section(inner, f"{where}.", f"`{where}`") for inner, where in below]
    return "\n".join(parts)


def page() -> str:
    """The whole page."""
    return f"{HEAD}\n{section(RunConfig, '', 'A run')}"


def main() -> int:
    """Write the page; with `--check`, only say whether it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the page is not up to date")
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
