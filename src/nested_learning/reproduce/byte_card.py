"""What a finished run of `byte_bar` leaves beside its log: evaluation, weights, and a card.

Every number of a card is read from the files of that run.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from nested_learning.bench.machine import describe
from nested_learning.data.corpus import open_corpus
from nested_learning.data.shards import ShardFolder
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.held_out import HeldOut, HeldOutBytes
from nested_learning.eval.loading import load
from nested_learning.report import markdown_table
from nested_learning.reproduce.runner import Result
from nested_learning.runtime import pick_device
from nested_learning.train.checkpoint import write_atomic
from nested_learning.train.checkpoint.export import export_checkpoint
from nested_learning.train.config import RunConfig
from nested_learning.train.metrics import Record, read_metrics

WEIGHTS, RESULT, CARD = "weights.safetensors", "held_out.json", "README.md"
LAST = 5  # the end of a run: its last part of so many, by its log


def training_record(config: RunConfig) -> Result:
    """What the log of a run says: mean training loss of its last fifth, cost, and the validations.

    `seconds` are those of the steps that led to the weights, without validation, saving, and steps that were
    made again after an interruption.
    """
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    end = [row["loss"] for row in steps if row["step"] > config.train.steps * (1 - 1 / LAST)]
    device = str(pick_device(config.train.device, "train.device"))
    a_step = config.train.batch_size * config.train.seq_len
    return {
        "loss": sum(end) / len(end),
        "steps": int(steps[-1]["step"]),
        "seconds": seconds(steps),
        "memory_gib": max(row["memory_gib"] for row in steps),
        "hardware": str(describe(device)["processor"]),
        "curve": [
            [row["step"] * a_step, row["valid_bits_per_byte"]] for row in rows if "valid_bits_per_byte" in row
        ],
    }


def seconds(steps: list[Record]) -> float:
    """Time that the steps between the rows of a log took, by the speed that each row states."""
    first = {"tokens": 0.0}
    return sum(
        (after["tokens"] - before["tokens"]) / after["tokens_per_second"]
        for before, after in pairwise([first, *steps])
    )


def finish_run(config: RunConfig, label: str, windows: int) -> Result:
    """Evaluate the last checkpoint and write result, weights and card to the run's folder.

    Args:
        label: of the model, for the card.
        windows: most windows that are evaluated.
    """
    folder, shards = config.run_dir, str(config.data.shards)
    weights = export_checkpoint(folder, folder / WEIGHTS)
    loaded = load(weights, device=str(pick_device(config.train.device, "train.device")))
    settings = HeldOutBytes(shards=shards, length=config.train.seq_len, max_samples=windows)
    result = evaluate(HeldOut(loaded, settings), folder / RESULT)
    corpus, metric = open_corpus(shards), result.metrics[0]
    record = {
        **training_record(config),
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "bits_per_byte": metric.value,
        "low": metric.low,
        "high": metric.high,
        "windows": result.samples,
        "sha256": result.settings["sha256"],
        "train_tokens": len(corpus.train),
        "text": corpus.fingerprint,
        "weights": loaded.sha256,
        "git": result.versions["git"],
    }
    text = card(config, label, record, result.versions["nested_learning"], ShardFolder(shards).manifest)
    write_atomic(folder / CARD, text.encode())
    return record


USE = f"""```python
import torch

from nested_learning.train.checkpoint import load_checkpoint

model, tokenizer, config = load_checkpoint("{WEIGHTS}")
text = torch.tensor([tokenizer.encode("The ")])
print(tokenizer.decode(model.generate(text, 200)[0].tolist()))
```

The result again: `uv run nl eval held-out --checkpoint {WEIGHTS} --shards FOLDER`."""


def card(config: RunConfig, label: str, record: Result, version: str, manifest: Mapping[str, Any]) -> str:
    """The model card of a run, Markdown.

    Args:
        record: of `finish_run`.
        version: of this package.
        manifest: of the shards.
    """
    between = "" if record["low"] is None else f" ({record['low']:.4f} to {record['high']:.4f})"
    parts = [
        f"# {label}, byte level: {config.name}",
        f"A language model of bytes with {record['parameters']:,} parameters, one of the runs of "
        f"`nl reproduce byte-bar` (nested_learning {version}, commit {record['git']}).",
        "## Result",
        f"**{record['bits_per_byte']:.4f} bits per byte**{between} on {record['windows']} windows of "
        f"{config.train.seq_len} tokens from held-out documents, each from a fresh state, after the last "
        "step. In brackets the 95 % interval over windows, which says nothing of other seeds; the table of "
        f"all runs does. SHA-256 of the tokens read: `{record['sha256']}`.",
        f"Files: `{WEIGHTS}`, `{RESULT}`, `metrics.jsonl` (the log), `loss.png`.",
        "## Settings",
        settings_table(config),
        "## Data",
        data_section(config, record, manifest),
        "## Cost",
        f"{record['seconds']:.0f} seconds of training on {record['hardware']} ({record['steps']} steps, "
        f"without validation and saving), {record['memory_gib']:.2f} GiB of memory at most.",
        "## Use",
        USE,
    ]
    return "\n\n".join(parts) + "\n"


def settings_table(config: RunConfig) -> str:
    """What decides a run, as a table; `config.yaml` beside the card has all of it."""
    model, train, optim = config.model, config.train, config.optim
    levels = ", ".join(
        f"{level.name} ({level.chunk_size})" if level.chunk_size else level.name for level in model.levels
    )
    rows = [
        ["mixer", model.mixer],
        ["levels", levels],
        ["width, layers, heads", f"{model.dim}, {model.num_layers}, {model.num_heads}"],
        ["chunk", f"{model.chunk_size}"],
        ["steps x rows x tokens", f"{train.steps} x {train.batch_size} x {train.seq_len}"],
        ["optimizer", f"{optim.name}, learning rate {optim.lr:g}, warm-up {optim.warmup_steps} steps"],
        ["precision", train.precision],
        ["seed", f"{config.seed}"],
    ]
    return markdown_table(["setting", "value"], rows) + "\nAll settings: `config.yaml`."


def data_section(config: RunConfig, record: Result, manifest: Mapping[str, Any]) -> str:
    """Where the bytes came from, how many there are, and by which hash to know them."""
    assert config.data.mixture is not None
    rows = []
    for source in config.data.mixture.sources:
        splits = manifest["sources"][source.name]["splits"]
        where = f"{source.path} ({source.subset})" if source.subset else source.path
        counts = [
            f"{splits[split]['documents']:,} / {splits[split]['bytes']:,}" for split in ("train", "valid")
        ]
        rows.append([where, f"first {source.limit:,}" if source.limit else "all", *counts])
    return (
        markdown_table(["source", "records", "training documents / bytes", "held out"], rows)
        + f"\nFingerprint of the training tokens: `{record['text']}`. Bytes are those of the texts as they "
        "are, with an end token after each. Copies were dropped before documents were held out by a hash of "
        "their text. The licence of the text is that of its source."
    )
