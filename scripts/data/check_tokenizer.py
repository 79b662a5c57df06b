"""Check a tokenizer: does text come back exactly, and how well does it fit the sources of a mixture?

uv run python scripts/data/check_tokenizer.py --tokenizer-path outputs/tokenizers/sample/tokenizer.model \
    --manifest configs/data/sample.yaml

Exit code 1 if text is lost: unknown tokens, or texts that come back changed.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.command import Parser, run_script
from nested_learning.config import load_data_config
from nested_learning.data.coverage import altered_texts, coverage, coverage_table
from nested_learning.data.sampling import sample_mixture
from nested_learning.data.script import with_limits
from nested_learning.data.shards import ShardFolder
from nested_learning.data.tokenizer import load_tokenizer


def main() -> int:
    """Print what was found; 1 if the tokenizer loses text or is not that of the shards."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("--tokenizer-path", type=Path, required=True)
    add("--manifest", type=Path, help="measure it on the sources of this mixture")
    add("--shards", type=Path, help="check that these shards were made with it")
    add("--sample-chars", type=int, default=2_000_000)
    add("--limit", nargs="+", default=[], metavar="NAME=RECORDS")
    add("--fallback-split")
    options = made.parse_args()
    tokenizer = load_tokenizer(options.tokenizer_path)
    problems = [f"{text!r} comes back as {back!r}" for text, back in altered_texts(tokenizer)]
    print(
        f"{options.tokenizer_path}: {tokenizer.vocab_size} pieces, end token {tokenizer.eos_id}, "
        f"{len(tokenizer.byte_ids)} byte pieces, {tokenizer.fingerprint}"
    )
    if options.manifest is not None:
        mixture = with_limits(
            load_data_config(options.manifest).mixture, options.limit, options.fallback_split
        )
        samples = sample_mixture(mixture, options.sample_chars)
        parts = {name: sample.held_out or sample.training for name, sample in samples.items()}
        rows = {name: coverage(tokenizer, part) for name, part in parts.items() if any(part)}
        print(coverage_table(rows))
        problems += [f"{name}: {row.unknown:.2%} unknown tokens" for name, row in rows.items() if row.unknown]
        problems += [f"{name}: texts come back changed" for name, row in rows.items() if not row.lossless]
    if options.shards is not None:
        made_with = ShardFolder(options.shards).manifest["tokenizer"]["fingerprint"]
        if made_with != tokenizer.fingerprint:
            problems.append(f"{options.shards} was made with another tokenizer, {made_with}")
    print("\n".join(["problems:", *problems]) if problems else "all good")
    return 1 if problems else 0


if __name__ == "__main__":
    run_script(main)
