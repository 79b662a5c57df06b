r"""Check that a tokenizer loses no text, and how well it fits the sources of a mixture.

uv run nl data check-tokenizer --tokenizer-path outputs/tokenizers/sample/tokenizer.model \
    --manifest configs/data/sample.yaml

Exit status 1 if text is lost: unknown tokens, or texts that change when they are encoded and decoded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nested_learning.command import Parser
from nested_learning.commands.data.common import add_limit_options, print_problems, with_limits
from nested_learning.config import load_data_config
from nested_learning.data.pipeline.coverage import altered_texts, coverage_by_source, coverage_table
from nested_learning.data.pipeline.sampling import sample_mixture
from nested_learning.data.shards import ShardFolder
from nested_learning.data.tokenizer import Tokenizer, load_tokenizer


def parser() -> Parser:
    """The options of `nl data check-tokenizer`."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("--tokenizer-path", type=Path, required=True)
    add("--manifest", type=Path, help="measure it on the sources of this mixture")
    add("--shards", type=Path, help="check that these shards were made with it")
    add("--sample-chars", type=int, default=2_000_000)
    add_limit_options(made)
    return made


def main() -> int:
    """Print what was found and return 1 if the tokenizer loses text or is not that of the shards."""
    options = parser().parse_args()
    tokenizer = load_tokenizer(options.tokenizer_path)
    problems = [f"{text!r} comes back as {back!r}" for text, back in altered_texts(tokenizer)]
    print(
        f"{options.tokenizer_path}: {tokenizer.vocab_size} pieces, end token {tokenizer.eos_id}, "
        f"{len(tokenizer.byte_ids)} byte pieces, {tokenizer.fingerprint}"
    )
    if options.manifest is not None:
        problems += check_coverage(tokenizer, options)
    if options.shards is not None:
        made_with = ShardFolder(options.shards).manifest["tokenizer"]["fingerprint"]
        if made_with != tokenizer.fingerprint:
            problems.append(f"{options.shards} was made with another tokenizer, {made_with}")
    return print_problems(problems)


def check_coverage(tokenizer: Tokenizer, options: argparse.Namespace) -> list[str]:
    """Print how the tokenizer fits each source of the manifest, and return what it loses."""
    mixture = load_data_config(options.manifest).mixture
    mixture = with_limits(mixture, options.limit, options.fallback_split)
    rows = coverage_by_source(tokenizer, sample_mixture(mixture, options.sample_chars))
    print(coverage_table(rows))
    unknown = [f"{name}: {row.unknown:.2%} unknown tokens" for name, row in rows.items() if row.unknown]
    return unknown + [f"{name}: texts come back changed" for name, row in rows.items() if not row.lossless]
