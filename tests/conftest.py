"""One thread, unless OMP_NUM_THREADS says otherwise: tests run beside other work and start processes of their
own, and OpenMP threads that wait for a core are slower than none."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from reorder_sums import reorder_sums

if TYPE_CHECKING:
    from nested_learning.eval.loading import Loaded

TEXT = "The quick brown fox jumps over the lazy dog. How many dogs are there? One dog sleeps all day.\n"

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, too
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
KERNELS = ExitStack()
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells do for what they start in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reorder-sums",
        type=int,
        metavar="N",
        help="sum products in another order, the N-th; see reorder_sums.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("reorder_sums") is not None:
        KERNELS.enter_context(reorder_sums(config.getoption("reorder_sums")))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core, at most 4; none where single files are named: they end before workers start."""
    names = [argument.split("::")[0] for argument in config.args]
    if not all(Path(config.invocation_params.dir, name).is_dir() for name in names):
        return 0
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)


def pytest_unconfigure() -> None:
    KERNELS.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums do not depend on the number of threads, and small models are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Hugging Face hub at a port that nobody listens to."""
    from huggingface_hub import constants

    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        yield


# One tiny trained run for the session, and the same weights as an exported file


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a HOPE model of two layers on bytes: a mixer with memories, a fast level and an MLP."""
    from nested_learning.train.config import run_config
    from nested_learning.train.launch import launch

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
    from nested_learning.train.checkpoint import export_checkpoint

    return export_checkpoint(run_folder, tmp_path_factory.mktemp("exported") / "model.safetensors")


@pytest.fixture(scope="session")
def loaded(exported: Path) -> Loaded:
    """That file, loaded."""
    from nested_learning.eval.loading import load

    return load(exported)
