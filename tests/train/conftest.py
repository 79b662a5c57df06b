"""A text of one line, and trainers on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyModel, tiny_config
from torch import nn

from nested_learning.data.corpus import Corpus
from nested_learning.data.tokenizer import ByteTokenizer
from nested_learning.runtime import set_seed
from nested_learning.train.strategy import OneProcess
from nested_learning.train.trainer import Trainer


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Sums do not depend on the number of threads, here and in subprocesses."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
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


@pytest.fixture
def make_trainer(tmp_path: Path, corpus: Corpus) -> Callable[..., Trainer]:
    """`make_trainer(name, resume=None, model=None, **train)`: a trainer of a new model with seed 0."""

    def make(
        name: str = "run", resume: Path | None = None, model: nn.Module | None = None, **train: Any
    ) -> Trainer:
        config = tiny_config(tmp_path, name, **train)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        set_seed(config.seed)
        return Trainer(config, model or TinyModel(), corpus, OneProcess(), resume)

    return make
