r"""Train a SentencePiece tokenizer on a weighted sample of a mixture, and report how well it fits.

uv run nl data tokenizer --manifest configs/data/sample.yaml \
    --vocab-size 4096 --output-dir outputs/tokenizers/sample

Writes tokenizer.model and report.json. Text is not normalised and characters outside the vocabulary become
bytes, so that every text comes back exactly. The report is measured on held-out documents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nested_learning.command import Parser
from nested_learning.commands.data.common import add_limit_options, file_log, with_limits
from nested_learning.config import load_data_config
from nested_learning.data.pipeline.coverage import Coverage, coverage_by_source, coverage_table
from nested_learning.data.pipeline.sampling import SourceSample, sample_mixture
from nested_learning.data.tokenizer import MODEL_TYPES, SentencePieceTokenizer, train_sentencepiece


def parser() -> Parser:
    """The options of `nl data tokenizer`."""
    made = Parser(description=__doc__)
    add = made.add_argument
    add("--manifest", type=Path, required=True, help="a configuration with a mixture")
    add("--vocab-size", type=int, required=True)
    add("--output-dir", type=Path, required=True)
    add("--log-file", type=Path)
    add("--model-type", choices=MODEL_TYPES, default="unigram")
    add("--sample-chars", type=int, default=50_000_000, help="characters to train on (default %(default)s)")
    add_limit_options(made)
    add("--no-progress", action="store_true")
    return made


def main() -> None:
    """Sample, train, measure and write."""
    options = parser().parse_args()
    log = file_log(options.log_file)
    mixture = with_limits(load_data_config(options.manifest).mixture, options.limit, options.fallback_split)
    samples = sample_mixture(mixture, options.sample_chars, not options.no_progress)
    for name, sample in samples.items():
        log(f"{name}: {describe_sample(sample)}")
    texts = [text for sample in samples.values() for text in sample.training]
    tokenizer = train_sentencepiece(texts, options.vocab_size, options.model_type)
    rows = coverage_by_source(tokenizer, samples)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "tokenizer.model"
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(tokenizer.state()["model"])
    unfinished.replace(path)
    report = describe_fit(tokenizer, options.model_type, samples, rows)
    (options.output_dir / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    log(coverage_table(rows))
    log(f"{path}: {tokenizer.vocab_size} pieces, {options.model_type}, {tokenizer.fingerprint}")


def describe_fit(
    tokenizer: SentencePieceTokenizer,
    model_type: str,
    samples: Mapping[str, SourceSample],
    rows: Mapping[str, Coverage],
) -> dict[str, Any]:
    """The content of report.json: the tokenizer, what it was trained on and how it fits each source."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "model_type": model_type,
        "normalisation": "none (identity); byte fallback",
        "sampled_chars": {name: sample.chars for name, sample in samples.items()},
        "held_out": {name: bool(sample.held_out) for name, sample in samples.items()},
        "sources": {name: asdict(row) for name, row in rows.items()},
    }


def describe_sample(sample: SourceSample) -> str:
    """What was drawn, and whether it was enough."""
    short = " (all there is)" if sample.chars < sample.wanted * 0.9 else ""
    return (
        f"{len(sample.training)} documents, {sample.chars:,} of {sample.wanted:,} characters{short}; "
        f"{len(sample.held_out)} held out; {sample.problems} unusable records"
    )
