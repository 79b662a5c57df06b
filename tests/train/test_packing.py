"""Training on rows of several documents: the loss and the update of documents read one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config
from torch.nn import functional as F

from nested_learning.data.config import LoaderConfig
from nested_learning.data.corpus import Corpus
from nested_learning.data.shards import ShardSet
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.runtime import set_seed
from nested_learning.train.config import RunConfig, run_config
from nested_learning.train.strategy import OneProcess
from nested_learning.train.trainer import Trainer

SEQ, CHUNK, VOCAB = 32, 4, 60
LENGTHS = [5, 9, 31, 12, 3, 70, 8, 16, 2, 20, 7, 33]


@pytest.fixture
def documents(tmp_path: Path) -> list[list[int]]:
    generator = np.random.default_rng(0)
    texts = [generator.integers(1, VOCAB, length).tolist() for length in LENGTHS]
    np.concatenate(texts).astype("<u2").tofile(tmp_path / "train-00000.bin")
    np.cumsum([0, *LENGTHS[:-1]]).astype("<u8").tofile(tmp_path / "train.starts")
    np.zeros(16 * len(LENGTHS), np.uint8).tofile(tmp_path / "train.hashes")
    return texts


def packed_config(folder: Path) -> RunConfig:
    config = tiny_config(folder, "packed", seq_len=SEQ, batch_size=4, accumulation=2)
    levels = (LevelSpec(name="fast", chunk_size=2 * CHUNK), LevelSpec(name="plain"))
    model = HopeConfig(
        vocab_size=VOCAB, dim=16, num_layers=2, num_heads=2, chunk_size=CHUNK, levels=levels, seq_len=SEQ
    )
    data = replace(config.data, loader=LoaderConfig(crossing=False, packing=True))
    return replace(config, model=model, data=data)


def make(folder: Path) -> Trainer:
    config = packed_config(folder)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    tokens = ShardSet(folder, "train", "<u2", [sum(LENGTHS)])
    valid = np.arange(4 * (SEQ + 1), dtype=np.uint16) % VOCAB
    corpus = Corpus(
        train=tokens,
        valid=valid,
        tokenizer=ByteTokenizer(),
        unigram_entropy=4.0,
        bytes_per_token=1.0,
        provenance={},
    )
    return Trainer(config, HopeLM(config.model), corpus, OneProcess())


def test_the_loss_is_that_of_the_documents_alone(tmp_path: Path, documents: list[list[int]]) -> None:
    """All rows are one step: every document counts once, each read in a context of its own."""
    trainer = make(tmp_path)
    assert trainer.loader.num_windows == 8
    tokens = torch.cat([next(trainer.loader) for _ in range(2)])  # one epoch
    total = torch.zeros(())
    targets = 0
    for text in documents:
        for start in range(0, len(text) - 1, SEQ):  # a long one goes on in a new context
            piece = torch.tensor(text[start : start + SEQ + 1])
            logits, _ = trainer.model(piece[None, :-1])
            total = total + F.cross_entropy(logits[0], piece[1:], reduction="sum")
            targets += len(piece) - 1
    trainer.model.zero_grad()
    (total / targets).backward()
    expected = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.optimizer.zero_grad()
    loss = trainer._accumulate(tokens)
    assert float(loss) == pytest.approx(float(total.detach()) / targets, rel=1e-5)
    for parameter, gradient in zip(trainer.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_run_on_packed_rows_learns_and_resumes(tmp_path: Path, documents: list[list[int]]) -> None:
    whole = make(tmp_path)
    losses = [float(whole.update(next(whole.loader))[0]) for _ in range(8)]
    assert losses[-1] < losses[0]
    part = make(tmp_path)
    for _ in range(3):
        part.update(next(part.loader))
    part.save()
    resumed = make(tmp_path)
    resumed.step, _ = resumed.checkpoints.load(part.store.latest())
    again = [float(resumed.update(next(resumed.loader))[0]) for _ in range(5)]
    assert again == losses[3:]


def test_online_learning_knows_no_documents() -> None:
    settings = {"train": {"inner": "online"}, "data": {"loader": {"crossing": False, "packing": True}}}
    with pytest.raises(ValueError, match=r"data.loader.packing must be false for train.inner = online"):
        run_config(settings)
