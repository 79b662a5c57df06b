"""What the processes of these tests do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nested_learning.config import load_config
from nested_learning.data.config import DedupConfig, MixtureConfig, SourceConfig
from nested_learning.data.pipeline.process import ProcessingJob, process_mixture
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.train.config import RunConfig
from nested_learning.train.launch import launch
from nested_learning.train.metrics import read_metrics

WORDS = "It is a truth universally acknowledged, that a text must be in want of a reader. "
TINY = {
    "data": "bytes",
    "levels": "fast",
    "model.dim": 32,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.chunk_size": 8,
    "model.levels.0.chunk_size": 8,
    "train.seq_len": 16,
    "train.batch_size": 4,
    "train.steps": 12,
    "train.log_every": 1,
    "train.eval_every": 6,
    "train.save_every": 4,
    "train.eval_batches": 2,
    "train.sample_tokens": 0,
    "train.device": "cpu",
    "logging.progress": "false",
}


def tiny_overrides(folder: Path, name: str, **more: Any) -> list[str]:
    """Overrides for a run of a second on a text of one line, in `folder/name`."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(WORDS * 80)
    places = {
        "data.files": f"[{text}]",
        "data.cache_dir": folder / "cache",
        "train.output_dir": folder,
        "name": name,
    }
    return [f"{key}={value}" for key, value in {**TINY, **places, **more}.items()]


def write_shards(folder: Path) -> Path:
    """Shards of short documents, of one to four sentences."""
    texts = [WORDS * (1 + i % 4) + str(i) for i in range(200)]
    source = folder.parent / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    mixture = MixtureConfig(
        sources=(SourceConfig(name="texts", kind="jsonl", path=str(source)),),
        dedup=DedupConfig(near=False),
        valid_share=0.1,
    )
    quiet = ProcessingJob(
        mixture=mixture, tokenizer=ByteTokenizer(), folder=folder, progress=False, log=lambda _: None
    )
    process_mixture(quiet)
    return folder


def train(overrides: list[str], strategy: str) -> int:
    """Run; the number of updates made."""
    return launch(load_config("pilot_smoke", overrides), strategy).step


def losses(run_dir: Path, key: str = "loss") -> dict[int, float]:
    """Step → a number of the metrics file."""
    return {int(row["step"]): row[key] for row in read_metrics(run_dir / "metrics.jsonl") if key in row}


def config_of(overrides: list[str]) -> RunConfig:
    return load_config("pilot_smoke", overrides)
