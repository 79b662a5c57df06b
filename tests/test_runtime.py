"""Devices by name, what every program says of one that is not there, and freed memory."""

from __future__ import annotations

import io
import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nested_learning.bench.settings import BenchSettings
from nested_learning.runtime import check_device, pick_device, random_state, set_random_state, set_seed
from nested_learning.train.config import RunConfig
from nested_learning.train.strategy import build_strategy

ROOT = Path(__file__).parents[1]
FAULTS = """
import resource, sys, torch
from nested_learning.runtime import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(2**21)  # 8 MiB
for _ in range(5):
    y = [x + 1, x + 2, x + 3, x + 4]; del y
before = faults()
for _ in range(300):
    y = [x + 1, x + 2, x + 3, x + 4]; del y
print(faults() - before)
"""


@pytest.fixture
def machine(monkeypatch):
    """Let torch believe in so many CUDA devices and so many of Apple's."""

    def make(cuda: int = 0, mps: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps > 0)

    return make


@pytest.mark.parametrize(
    ("cuda", "mps", "name", "expected"),
    [
        (0, 0, "cpu", "cpu"),
        (0, 0, "auto", "cpu"),
        (2, 0, "auto", "cuda"),
        (2, 0, "cuda", "cuda"),
        (2, 0, "cuda:1", "cuda:1"),
        (0, 1, "mps", "mps"),
        (0, 1, "auto", "cpu"),
    ],
)
def test_devices_that_are_there(machine, cuda, mps, name, expected):
    machine(cuda, mps)
    assert pick_device(name) == torch.device(expected)
    assert pick_device(torch.device(expected)) == torch.device(expected)


@pytest.mark.parametrize(
    ("cuda", "mps", "name", "there"),
    [
        (0, 0, "cuda", "cpu"),
        (0, 0, "cuda:0", "cpu"),
        (0, 1, "cuda:0", "cpu, mps"),
        (2, 0, "cuda:2", "cpu, cuda:0, cuda:1"),
        (2, 0, "cuda:99", "cpu, cuda:0, cuda:1"),
        (2, 0, "mps", "cpu, cuda:0, cuda:1"),
    ],
)
def test_devices_that_are_not_there(machine, cuda, mps, name, there):
    machine(cuda, mps)
    check_device(name)  # a name for another machine
    with pytest.raises(ValueError) as error:
        pick_device(name, "train.device")
    assert str(error.value) == f"train.device = {name!r} is not on this machine; it has {there}"


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:", "cuda:x", "cuda:-1", "gpu", "meta", "CPU", "0"])
def test_names_of_no_device(name):
    for check in (check_device, pick_device):
        with pytest.raises(ValueError) as error:
            check(name)
        assert str(error.value) == f"device must be auto, cpu, cuda, cuda:NUMBER or mps, got {name!r}"


@pytest.fixture
def generators(machine, monkeypatch):
    """So many CUDA generators, each of which holds one number."""

    def make(cuda: int) -> list[int]:
        machine(cuda)
        held = [100 + number for number in range(cuda)]

        def put(state: torch.Tensor, device: int) -> None:
            held[device] = int(state)

        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.tensor(x) for x in held])
        monkeypatch.setattr(torch.cuda, "set_rng_state", put)
        return held

    return make


@pytest.mark.parametrize(
    ("there", "here", "expected"),
    [(2, 2, [7, 8]), (2, 1, [7]), (2, 3, [7, 8, 102]), (2, 0, []), (0, 2, [100, 101])],
)
def test_random_states_of_cuda_go_to_the_devices_of_the_same_number(generators, there, here, expected):
    held = generators(there)
    held[:] = [7, 8][:there]
    torch.manual_seed(3)
    saved = random_state()
    file = io.BytesIO()
    torch.save(saved, file)  # as in a checkpoint: tensors and plain values only
    file.seek(0)
    drawn = torch.rand(2)
    held = generators(here)
    set_random_state(torch.load(file, weights_only=True))
    assert held == expected
    assert torch.equal(torch.rand(2), drawn)


def test_a_seed_is_that_of_every_device(machine, monkeypatch):
    machine(cuda=2)
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    set_seed(11)
    assert seeds == [11]


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_every_way_to_train_looks_for_its_device_first(machine, strategy):
    machine()
    config = RunConfig()
    config.train.device = "cuda:3"
    with pytest.raises(ValueError, match=r"^train\.device = 'cuda:3' is not on this machine; it has cpu$"):
        build_strategy(strategy, config)


def test_more_ranks_than_devices(machine, monkeypatch):
    machine(cuda=1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"train\.device of rank 1 = 'cuda:1' is not on this machine"):
        build_strategy("ddp", RunConfig())


def test_benchmarks_look_for_their_device(machine):
    machine(cuda=1)
    assert BenchSettings(device="auto").device == "cuda"
    with pytest.raises(ValueError, match=r"bench\.device = 'cuda:1' is not on this machine"):
        BenchSettings(device="cuda:1")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("bench/speed.py", []), ("bench/optimizers.py", ["--output", "unused"])],
)
def test_benchmark_scripts_say_so_in_one_line(machine, monkeypatch, capsys, tmp_path, script, arguments):
    machine()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [Path(script).name, *arguments, "--device", "cuda:0"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert "device = 'cuda:0' is not on this machine; it has cpu" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_blocks_are_not_faulted_in_again() -> None:
    """Counted in page faults of a fresh process: a block has 2,048 pages, and few are new to it.

    The other process is made to hand every block back: by itself, glibc sometimes learns to keep them.
    """

    def faults(mode: str, **environment: str) -> int:
        command = [sys.executable, "-c", FAULTS, mode]
        env = {**os.environ, **environment}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)

    assert 2 * faults("keep") < faults("return", MALLOC_MMAP_THRESHOLD_="65536")
