"""`train.inner=online` in the trainer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nested_learning.adapt import memorize
from nested_learning.data.corpus import Corpus
from nested_learning.data.loader import sequential_batches
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.models.lm import HopeLM
from nested_learning.runtime import set_seed
from nested_learning.train.config import RunConfig, run_config
from nested_learning.train.strategy import OneProcess, Strategy
from nested_learning.train.trainer import Trainer


def corpus() -> Corpus:
    text = b"the quick brown fox jumps over the lazy dog. " * 60
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    return Corpus(
        train=tokens[:2000],
        valid=tokens[2000:],
        tokenizer=ByteTokenizer(),
        unigram_entropy=2.9,
        bytes_per_token=1.0,
        provenance={},
    )


def config(folder: Path, **train: Any) -> RunConfig:
    levels = [{"name": "fast", "chunk_size": 8}, {"name": "mlp"}]
    return run_config(
        {
            "model": {"vocab_size": 257, "dim": 16, "num_layers": 1, "num_heads": 2, "levels": levels},
            "adapt": {"paths": "all", "chunk_size": 8, "lr": 0.2},
            "optim": {"lr": 1e-2, "warmup_steps": 2},
            "logging": {"progress": False},
            "train": {"steps": 4, "seq_len": 24, "batch_size": 4, "eval_batches": 2, "device": "cpu"}
            | {"output_dir": str(folder), "inner": "online", **train},
        }
    )


def trainer(settings: RunConfig, strategy: Strategy | None = None) -> Trainer:
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    set_seed(settings.seed)
    return Trainer(settings, HopeLM(settings.model), corpus(), strategy or OneProcess())


def test_the_update_does_not_depend_on_accumulation(tmp_path: Path) -> None:
    whole, parts = (trainer(config(tmp_path, accumulation=n)) for n in (1, 4))
    for _ in range(2):
        tokens = next(whole.loader)
        first, second = whole.update(tokens), parts.update(tokens)
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_training_and_validation_report_losses_from_before_learning(tmp_path: Path) -> None:
    run = trainer(config(tmp_path, batch_size=2, eval_batches=1))
    tokens = next(run.loader)
    expected = memorize(run.model, tokens, None, run.config.adapt)[0].losses.mean()
    torch.testing.assert_close(run.update(tokens)[0], expected, rtol=1e-5, atol=1e-6)
    (batch,) = sequential_batches(run.corpus.valid, 24, 2, 1)
    expected = memorize(run.model, batch, None, run.config.adapt)[0].losses.mean()
    assert run.evaluate() == pytest.approx(float(expected), rel=1e-5)


def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    class Sharded(OneProcess):
        name, shards_parameters = "fsdp", True

    with pytest.raises(ValueError, match="needs whole parameters on every rank, which fsdp does not keep"):
        trainer(config(tmp_path), Sharded())


def test_a_step_through_the_writes_of_memories_differs_from_the_first_order_one(tmp_path: Path) -> None:
    first, through = (trainer(config(tmp_path, grad_through_write=on)) for on in (False, True))
    assert through.config.model.mixer == "self_mod"
    tokens = next(first.loader)
    (loss, norm), (same_loss, other_norm) = (one.update(tokens) for one in (first, through))
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=0)
    assert other_norm.isfinite() and abs(other_norm - norm) > 1e-4 * norm
