"""Check the sources of a mixture, and, with --shards, what was made of them:

uv run python scripts/data/validate_mixture.py configs/data/sample.yaml --shards outputs/data/sample

Exit code 1 if something is wrong.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser, run_script
from nested_learning.config import load_data_config
from nested_learning.data.mixture import Rows
from nested_learning.data.script import with_limits
from nested_learning.data.shards import ShardFolder
from nested_learning.data.validate import check_mixture, check_shards


def main() -> int:
    """Print a line per source and what is wrong; 1 if anything is."""
    made = Parser(description=__doc__)
    made.add_argument("config", type=Path)
    made.add_argument("overrides", nargs="*", help="fields of it, such as mixture.seed=1")
    made.add_argument(
        "--shards", type=Path, help="also check checksums, tokens, boundaries and splits of these"
    )
    made.add_argument(
        "--seq-len", type=int, help="with --shards: padding of rows of this length that no document crosses"
    )
    made.add_argument(
        "--block", type=int, default=1, help="documents that share a row begin at multiples of it"
    )
    made.add_argument("--fallback-split")
    options = made.parse_args()
    config = load_data_config(options.config, options.overrides)
    lines, problems = check_mixture(with_limits(config.mixture, [], options.fallback_split))
    if options.shards is not None:
        folder = ShardFolder(options.shards)
        problems += check_shards(folder)
        for name, entry in folder.manifest["sources"].items():
            parts = [
                f"{split} {part['documents']} documents, {part['tokens']} tokens"
                for split, part in entry["splits"].items()
            ]
            lines.append(f"{folder.path / name}: {'; '.join(parts)}")
        if options.seq_len is not None and not problems:
            for name, tokens in folder.open("train").items():
                alone = Rows(tokens, options.seq_len, crossing=False).padding()
                packed = Rows(tokens, options.seq_len, crossing=False, block=options.block).padding()
                lines.append(
                    f"{folder.path / name}: {alone:.1%} padding with loader.crossing=false, "
                    f"{packed:.1%} with loader.packing=true in blocks of {options.block}"
                )
    print("\n".join(lines))
    print("\n".join(["problems:", *problems]) if problems else "all good")
    return 1 if problems else 0


if __name__ == "__main__":
    run_script(main)
