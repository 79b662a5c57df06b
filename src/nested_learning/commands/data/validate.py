"""Check the sources of a mixture and, with --shards, what was made of them.

uv run nl data validate configs/data/sample.yaml --shards outputs/data/sample

Exit status 1 if something is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nested_learning.command import Parser
from nested_learning.commands.data.common import print_problems, with_limits
from nested_learning.config import load_data_config
from nested_learning.data.mixture import Rows
from nested_learning.data.pipeline.validate import check_mixture, check_shards
from nested_learning.data.shards import ShardFolder


def parser() -> Parser:
    """The options of `nl data validate`."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("config", type=Path)
    add("overrides", nargs="*", help="fields of it, such as mixture.seed=1")
    add("--shards", type=Path, help="also check checksums, tokens, boundaries and splits of these")
    length = "with --shards: padding of rows of this length that no document crosses"
    add("--seq-len", type=int, help=length)
    block = "documents that share a row begin at multiples of it"
    add("--block", type=int, default=1, help=block)
    add("--fallback-split")
    return made


def main() -> int:
    """Print a line per source and what is wrong, and return 1 if anything is."""
    options = parser().parse_args()
    config = load_data_config(options.config, options.overrides)
    lines, problems = check_mixture(with_limits(config.mixture, [], options.fallback_split))
    if options.shards is not None:
        folder = ShardFolder(options.shards)
        problems += check_shards(folder)
        lines += describe_shards(folder)
        if options.seq_len is not None and not problems:
            lines += describe_padding(folder, options.seq_len, options.block)
    print("\n".join(lines))
    return print_problems(problems)


def describe_shards(folder: ShardFolder) -> Iterator[str]:
    """A line per source with the documents and tokens of its splits."""
    for name, entry in folder.manifest["sources"].items():
        parts = [
            f"{split} {part['documents']} documents, {part['tokens']} tokens"
            for split, part in entry["splits"].items()
        ]
        yield f"{folder.path / name}: {'; '.join(parts)}"


def describe_padding(folder: ShardFolder, seq_len: int, block: int) -> Iterator[str]:
    """A line per source with its share of padding in rows that no document crosses.

    Args:
        folder: shards.
        seq_len: tokens of a row.
        block: packed documents begin at multiples of it.
    """
    for name, tokens in folder.open("train").items():
        alone = Rows(tokens, seq_len, crossing=False).padding()
        packed = Rows(tokens, seq_len, crossing=False, block=block).padding()
        yield (
            f"{folder.path / name}: {alone:.1%} padding with loader.crossing=false, "
            f"{packed:.1%} with loader.packing=true in blocks of {block}"
        )
