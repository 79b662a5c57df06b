"""One Markdown table of result files.

uv run nl eval summarise outputs/eval/*/*.json
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser
from nested_learning.eval.results import summarise


def parser() -> Parser:
    """The options of `nl eval summarise`."""
    made = Parser(description=__doc__)
    made.add_argument("files", nargs="+", type=Path)
    return made


def main() -> None:
    """Print the table."""
    print(summarise(parser().parse_args().files), end="")
