"""One Markdown table of result files:

uv run python scripts/eval/summarise.py outputs/eval/*/*.json
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser, run_script
from nested_learning.eval.results import summarise


def main() -> None:
    """Print the table."""
    made = Parser(description=__doc__)
    made.add_argument("files", nargs="+", type=Path)
    print(summarise(made.parse_args().files), end="")


if __name__ == "__main__":
    run_script(main)
