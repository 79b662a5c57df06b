"""Train a SentencePiece tokenizer on a weighted sample of a mixture, and report how well it fits:

uv run python scripts/data/train_tokenizer.py --manifest configs/data/sample.yaml \
    --vocab-size 4096 --output-dir outputs/tokenizers/sample

Writes tokenizer.model and report.json. Text is not normalised and characters outside the vocabulary become
bytes, so that every text comes back exactly. The report is measured on held-out documents.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from nested_learning.command import Parser, run_script
from nested_learning.config import load_data_config
from nested_learning.data.coverage import coverage, coverage_table
from nested_learning.data.sampling import SourceSample, sample_mixture
from nested_learning.data.script import file_log, with_limits
from nested_learning.data.tokenizer import MODEL_TYPES, train_sentencepiece


def main() -> None:
    """Sample, train, measure, write."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("--manifest", type=Path, required=True, help="a configuration with a mixture")
    add("--vocab-size", type=int, required=True)
    add("--output-dir", type=Path, required=True)
    add("--log-file", type=Path)
    add("--model-type", choices=MODEL_TYPES, default="unigram")
    add("--sample-chars", type=int, default=50_000_000, help="characters to train on (default %(default)s)")
    add("--limit", nargs="+", default=[], metavar="NAME=RECORDS", help="read at most so many records")
    add("--fallback-split", help="split of hub data sets that lack the wanted one")
    add("--no-progress", action="store_true")
    options = made.parse_args()
    log = file_log(options.log_file)
    mixture = with_limits(load_data_config(options.manifest).mixture, options.limit, options.fallback_split)
    samples = sample_mixture(mixture, options.sample_chars, not options.no_progress)
    for name, sample in samples.items():
        log(f"{name}: {describe(sample)}")
    texts = [text for sample in samples.values() for text in sample.training]
    tokenizer = train_sentencepiece(texts, options.vocab_size, options.model_type)
    parts = {name: sample.held_out or sample.training for name, sample in samples.items()}
    rows = {name: coverage(tokenizer, part) for name, part in parts.items() if any(part)}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "tokenizer.model"
    scrap = path.with_name(path.name + ".tmp")
    scrap.write_bytes(tokenizer.state()["model"])
    scrap.replace(path)
    report = {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "model_type": options.model_type,
        "normalisation": "none (identity); byte fallback",
        "sampled_chars": {name: sample.chars for name, sample in samples.items()},
        "held_out": {name: bool(sample.held_out) for name, sample in samples.items()},
        "sources": {name: asdict(row) for name, row in rows.items()},
    }
    (options.output_dir / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    log(coverage_table(rows))
    log(f"{path}: {tokenizer.vocab_size} pieces, {options.model_type}, {tokenizer.fingerprint}")


def describe(sample: SourceSample) -> str:
    """What was drawn, and whether it was enough."""
    short = " (all there is)" if sample.chars < sample.wanted * 0.9 else ""
    return (
        f"{len(sample.training)} documents, {sample.chars:,} of {sample.wanted:,} characters{short}; "
        f"{len(sample.held_out)} held out; {sample.problems} unusable records"
    )


if __name__ == "__main__":
    run_script(main)
