"""One tiny trained run for the session, and the same weights as an exported file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nested_learning.eval.loading import Loaded, load
from nested_learning.train.checkpoint import export_checkpoint
from nested_learning.train.config import run_config
from nested_learning.train.launch import launch

TEXT = "The quick brown fox jumps over the lazy dog. How many dogs are there? One dog sleeps all day.\n"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums do not depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a HOPE model of two layers on bytes: a mixer with memories, a fast level and an MLP."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT * 40)
    data = {"files": [str(folder / "text.txt")], "cache_dir": str(folder / "cache"), "valid_fraction": 0.2}
    levels = [{"name": "fast", "chunk_size": 8}, {"name": "mlp"}]
    model = {"vocab_size": 257, "dim": 16, "num_layers": 2, "num_heads": 2, "chunk_size": 4}
    train = {"steps": 6, "batch_size": 4, "seq_len": 32, "save_every": 2, "eval_every": 2, "keep_last": 3}
    config = run_config(
        {
            "name": "tiny",
            "model": {**model, "seq_len": 32, "levels": levels},
            "data": {**data, "tokenizer": {"kind": "byte", "vocab_size": 257}},
            "optim": {"lr": 3e-3, "warmup_steps": 1},
            "train": {**train, "output_dir": str(folder), "device": "cpu", "sample_tokens": 0},
            "logging": {"progress": False},
        }
    )
    launch(config)
    return config.run_dir


@pytest.fixture(scope="session")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latest checkpoint of that run in one file."""
    return export_checkpoint(run_folder, tmp_path_factory.mktemp("exported") / "model.safetensors")


@pytest.fixture(scope="session")
def loaded(exported: Path) -> Loaded:
    """That file, loaded."""
    return load(exported)
