"""One HTML page of a run, of several runs, or of an experiment.

uv run nl report outputs/pilot_smoke
uv run nl report outputs/pilot_smoke outputs/longer --output both.html
uv run nl report outputs/reproduce/recall

The page holds its pictures and loads nothing. A run may be under way: the page shows what there is, and says
what is missing. With one run, each checkpoint that is kept writes a sample; --no-samples leaves that out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nested_learning.command import Parser

NAME = "report.html"


def parser() -> Parser:
    """The options of `nl report`."""
    made = Parser(description=__doc__)
    made.add_argument("runs", nargs="+", type=Path, help="run directories, or one folder of nl reproduce")
    default = f"{NAME} in the folder; of several runs, in the folder that they share"
    made.add_argument("--output", type=Path, help=f"the page, .html (default: {default})")
    made.add_argument("--no-samples", action="store_true", help="let checkpoints write no samples")
    return made


def main() -> None:
    """Write the page and say where."""
    options = parser().parse_args()
    output = options.output or default_output(options.runs)
    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"--output must end in .html, got {output}")

    from nested_learning.reporting import report
    from nested_learning.train.checkpoint import write_atomic

    content = report(options.runs, samples=not options.no_samples).encode()
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, content)
    print(f"{output}: {len(content) / 1e6:.1f} MB; open it in a browser")


def default_output(runs: Sequence[Path]) -> Path:
    """`report.html` in the only folder, or in the nearest one that all are in."""
    if len(runs) == 1:
        return runs[0] / NAME
    return Path(os.path.relpath(os.path.commonpath([run.resolve() for run in runs]))) / NAME
