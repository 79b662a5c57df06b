"""Bits per byte on held-out shards: the loop of the definition, the windows, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nested_learning.data.config import DataConfig, MixtureConfig, SourceConfig
from nested_learning.data.corpus import open_corpus
from nested_learning.data.pipeline.process import ProcessingJob, process_mixture
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.eval.evaluation import evaluate
from nested_learning.eval.held_out import HeldOut, HeldOutBytes, bits_per_byte, window_starts
from nested_learning.eval.loading import Loaded
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.train.config import RunConfig


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 200 short texts, a token per byte, a fifth of them held out."""
    folder = tmp_path_factory.mktemp("shards")
    texts = [f"text number {n}: " + "äbc " * (n % 7) for n in range(200)]
    (folder / "texts.txt").write_text("\n\f\n".join(texts), encoding="utf-8")
    source = SourceConfig(name="texts", kind="text", path=str(folder / "texts.txt"))
    mixture = MixtureConfig(sources=(source,), valid_share=0.2, long_share=0)
    mixture.dedup.near = False
    job = ProcessingJob(mixture=mixture, tokenizer=ByteTokenizer(), folder=folder / "made", progress=False)
    process_mixture(job)
    return folder / "made"


def loaded(shards: Path | None, tokenizer: Any = None) -> Loaded:
    torch.manual_seed(0)
    model = HopeConfig(vocab_size=257, dim=16, num_layers=1, num_heads=1, chunk_size=8)
    data = DataConfig(shards=None if shards is None else str(shards))
    return Loaded(
        model=HopeLM(model).eval().requires_grad_(False),
        tokenizer=tokenizer or ByteTokenizer(),
        config=RunConfig(model=model, data=data),
        sha256="0",
        path=Path("none"),
    )


def test_bits_are_those_of_a_loop_over_windows(shards: Path, tmp_path: Path) -> None:
    checkpoint, length = loaded(shards), 24
    settings = HeldOutBytes(length=length, max_samples=None, batch_size=4)
    result = evaluate(HeldOut(checkpoint, settings), tmp_path / "r.json")
    tokens = torch.tensor(open_corpus(shards).valid[:].astype("int64"))
    nats, size = 0.0, 0
    for first in range(0, len(tokens) - length, length + 1):
        row = tokens[first : first + length + 1]
        logits, _ = checkpoint.model(row[None, :-1])
        for place in range(length):
            nats -= float(F.log_softmax(logits[0, place], -1)[row[place + 1]])
            size += int(row[place + 1] < 256)
    metric = result.metrics[0]
    assert size < result.samples * length  # ends of documents are among the targets
    assert metric.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert metric.low is not None and metric.high is not None and metric.low < metric.value < metric.high


def test_a_model_that_guesses_pays_for_ends_of_documents_too() -> None:
    """Every target costs 8 bits, and of 10 of them 8 are bytes."""
    metric = bits_per_byte([10 * 8 * math.log(2)] * 3, [8] * 3)
    assert metric.value == pytest.approx(10) and metric.low == pytest.approx(10)
    uneven = bits_per_byte([math.log(2), 3 * math.log(2)], [1, 1])
    assert uneven.value == pytest.approx(2)
    assert uneven.high == pytest.approx(2 + 1.96 * 1) and uneven.stderr == pytest.approx(1)


def test_windows_are_spread_and_never_overlap() -> None:
    assert window_starts(100, 9, None) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert window_starts(100, 9, 4) == [0, 20, 50, 70]
    with pytest.raises(ValueError, match="length must be less than the 9 held-out tokens, got 9"):
        window_starts(9, 9, None)


def test_the_hash_tells_which_bytes_were_read(shards: Path) -> None:
    some, more = (
        HeldOut(loaded(shards), HeldOutBytes(length=24, max_samples=n)).settings()["sha256"] for n in (2, 3)
    )
    assert (
        some == HeldOut(loaded(shards), HeldOutBytes(length=24, max_samples=2)).settings()["sha256"] != more
    )


def test_what_holds_no_bytes_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match="names no data.shards; give --shards"):
        HeldOut(loaded(None), HeldOutBytes())
    with pytest.raises(ValueError, match="the checkpoint must hold a token per byte"):
        HeldOut(loaded(shards, SimpleNamespace(fingerprint="bpe")), HeldOutBytes())
