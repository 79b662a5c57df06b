"""A corpus of real text without a network: documentation and docstrings of the installed Python packages.

uv run python scripts/data/local_corpus.py --output-dir outputs/data/local_corpus --megabytes 60

Writes prose.jsonl.gz (.rst, .md and .txt files), docstrings.jsonl.zst and code.parquet, about a third of the
size each, to try the pipeline on all formats (configs/data/local.yaml). For experiments at home: the texts
are under the licences of their packages.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.checks import positive
from nested_learning.command import Parser, run_script
from nested_learning.data.local_text import code, docstrings, prose, write_corpus


def main() -> None:
    """Collect and write."""
    made = Parser(description=__doc__)
    made.add_argument("--output-dir", type=Path, required=True)
    made.add_argument("--megabytes", type=float, default=60, help="of text, in all (default %(default)s)")
    options = made.parse_args()
    positive("--megabytes", options.megabytes)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    each = int(options.megabytes * 1e6 / 3)
    for name, texts in (
        ("prose.jsonl.gz", prose()),
        ("docstrings.jsonl.zst", docstrings()),
        ("code.parquet", code()),
    ):
        path = options.output_dir / name
        print(f"{path}: {write_corpus(path, texts, each) / 1e6:.1f} MB of text")


if __name__ == "__main__":
    run_script(main)
