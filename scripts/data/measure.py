"""Speed and memory of the data path on text of this machine (make it with scripts/data/local_corpus.py):

uv run python scripts/data/measure.py --tokenizer-path outputs/tokenizers/local/tokenizer.model \
    --output-dir outputs/data/measure

Times are seconds of a processor, so that other work on the machine does not change them much.
"""

from __future__ import annotations

from pathlib import Path

from nested_learning.checks import one_of
from nested_learning.command import Parser, run_script
from nested_learning.config import load_data_config
from nested_learning.data.measure import (
    batch_encoding,
    full_pipeline,
    in_a_process,
    loader_rate,
    tokenize_and_shard,
    write_text,
)


def main() -> None:
    """Write text of two sizes, measure each step in a process of its own, print a table."""
    made = Parser(description=__doc__)
    made.add_argument("--manifest", type=Path, default=Path("configs/data/local.yaml"))
    made.add_argument(
        "--source", default="docstrings", help="the source to take text from (default %(default)s)"
    )
    made.add_argument("--tokenizer-path", type=Path, required=True)
    made.add_argument("--output-dir", type=Path, required=True)
    made.add_argument("--megabytes", type=float, nargs=2, default=(10, 100), metavar=("SMALL", "LARGE"))
    made.add_argument(
        "--model-tokens-per-second", type=float, help="what training takes, to compare the loader"
    )
    options = made.parse_args()
    mixture = load_data_config(options.manifest).mixture
    sources = {source.name: source for source in (mixture.sources if mixture else ())}
    one_of("--source", options.source, sources)
    source = sources[options.source]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    text, shards = options.output_dir / "text.jsonl", options.output_dir / "shards"
    print("| text, MB | step | MB/s of one core | peak memory, MiB |\n|---|---|---|---|")
    for wanted in options.megabytes:
        size = write_text(source, text, wanted)
        steps = {
            "SentencePiece, one batch in memory": (batch_encoding, options.tokenizer_path, text),
            "tokenize and shard": (tokenize_and_shard, options.tokenizer_path, text, shards, size),
            "filter, drop copies, tokenize, shard": (
                full_pipeline,
                options.tokenizer_path,
                text,
                shards,
                size,
            ),
        }
        for name, (function, *arguments) in steps.items():
            used = in_a_process(function, *arguments)
            print(f"| {size:.1f} | {name} | {used.rate:.2f} | {used.peak_mib:.0f} |", flush=True)
    rate = loader_rate(shards, seq_len=256, batch_size=8, steps=2000)
    print(f"\nloader: {rate / 1e6:.2f} M tokens/s of one core (8 rows of 256 tokens)")
    if options.model_tokens_per_second:
        print(f"that is {rate / options.model_tokens_per_second:.0f} times what training takes")


if __name__ == "__main__":
    run_script(main)
