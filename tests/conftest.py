"""One thread, unless OMP_NUM_THREADS says otherwise: tests run beside other work and start processes of their
own, and OpenMP threads that wait for a core are slower than none."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from reorder_sums import reorder_sums

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
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Hugging Face hub at a port that nobody listens to."""
    from huggingface_hub import constants

    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        yield
