"""Draw how documents become rows (the picture of docs/data.md):

uv run python scripts/data/draw_rows.py --output docs/images/rows.png
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.checks import at_least
from nested_learning.command import Parser, run_script
from nested_learning.data.picture import draw_rows


def main() -> None:
    """Parse and draw."""
    made = Parser(description=__doc__)
    made.add_argument("--output", type=Path, required=True)
    made.add_argument("--seq-len", type=int, default=24)
    made.add_argument("--chunk-size", type=int, default=8)
    options = made.parse_args()
    for name in ("seq_len", "chunk_size"):
        at_least(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    draw_rows(options.output, options.seq_len, options.chunk_size)


if __name__ == "__main__":
    run_script(main)
