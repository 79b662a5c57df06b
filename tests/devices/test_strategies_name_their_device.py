"""Every strategy takes its device from one place, `train.device` and the rank, and hands that one on."""

from __future__ import annotations

import ast
import os
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nested_learning.train.config import RunConfig
from nested_learning.train.strategy import build_strategy, ddp, deepspeed, distributed, fsdp

SOURCE = Path(distributed.__file__).parents[2]
NAMING = {
    "commands/inspect.py": "the default of an option",
    "train/starts.py": "the name of a card",
    "commands/doctor.py": "looks for cards",
    "data/synthetic/parity.py": "drawn on the host without a generator",
    "data/synthetic/recall.py": "drawn on the host without a generator",
    "eval/fit.py": "shapes without data",
    "layers/attention.py": "a counter of the host",
    "layers/documents.py": "what would make the host wait is not checked on CUDA",
    "models/bill.py": "counts without data",
    "models/pretrained.py": "what would make the host wait is not checked on CUDA",
    "ops/kernels.py": "the switch",
    "reproduce/byte_bar.py": "runs side by side, each on a card of its own",
    "runtime.py": "the names of devices",
    "train/checkpoint/run_file.py": "files are read to the host",
    "train/compiling.py": "what compiling lacks on a device",
    "train/guard.py": "waits on the CPU only",
    "train/level_report.py": "a start that is kept on the host",
    "train/memory.py": "memory of a card",
    "train/metrics.py": "memory of a card",
    "train/plain_loop.py": "CUDA graphs",
    "train/plan.py": "counts without data",
    "train/strategy/base.py": "the default",
    "train/strategy/ddp.py": "device numbers of DDP",
    "train/strategy/distributed.py": "a card for every rank, and NCCL",
    "train/trainer.py": "pinned memory for CUDA",
    "train/trial.py": "memory of a card",
}
"""Modules that name a kind of device, and why. All others compute where their inputs are."""
LAUNCHING = ("ops/*/triton.py", "graphs.py", "models/decode.py", "bench/*.py")
"""Modules that launch kernels or graphs, or measure devices."""
KINDS = ("cpu", "cuda", "meta")


def names_a_device(text: str) -> bool:
    """Whether code compares with, or makes, a device by name, or calls `torch.cuda`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr == "cuda" and isinstance(node.value, ast.Name):
            return True
        found = node.comparators if isinstance(node, ast.Compare) else getattr(node, "args", [])
        found = [*found, *(k.value for k in getattr(node, "keywords", []))] if isinstance(found, list) else []
        if any(isinstance(value, ast.Constant) and value.value in KINDS for value in found):
            return True
    return False


def test_few_modules_name_a_device() -> None:
    """Options of commands have names as defaults; those go through `pick_device`."""
    files = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    naming = {
        name
        for name, path in files.items()
        if not name.startswith(("commands/bench", "commands/evaluation"))
        and not any(fnmatch(name, pattern) for pattern in LAUNCHING)
        and any(kind in (text := path.read_text(encoding="utf-8")) for kind in KINDS)  # parsing takes long
        and names_a_device(text)
    }
    assert sorted(NAMING.keys() - naming) == []
    assert sorted(naming - NAMING.keys()) == []


class Card:
    """torch.cuda of a machine with two cards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", self.current.append)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the group of processes was made with; rank 1 of 2, on cards."""
    made: dict[str, Any] = {"card": Card(monkeypatch)}
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, **more: made.update(backend=backend)
    )
    return made


def config(device: str = "auto") -> RunConfig:
    made = RunConfig()
    made.train.device, made.train.batch_size = device, 4
    return made


@pytest.mark.parametrize(
    ("device", "expected"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")]
)
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_rank_has_the_card_of_its_number(
    joined: dict[str, Any], name: str, device: str, expected: str
) -> None:
    strategy = build_strategy(name, config(device))
    assert strategy.device == torch.device(expected)
    assert joined["card"].current == [strategy.device]
    assert joined["backend"] == "cpu:gloo,cuda:nccl"  # numbers of the host do not wait for the card


def test_a_machine_with_cards_can_train_on_its_cpu(joined: dict[str, Any]) -> None:
    assert build_strategy("ddp", config("cpu")).device == torch.device("cpu")
    assert joined["backend"] == "gloo" and joined["card"].current == []


def test_ddp_gets_the_device(joined: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(ddp, "DistributedDataParallel", lambda model, **options: seen.update(options))
    for device, expected in (("cuda", [torch.device("cuda:1")]), ("cpu", None)):
        build_strategy("ddp", config(device)).prepare(nn.Linear(2, 2), lambda model: None)  # type: ignore[arg-type, return-value]
        assert seen["device_ids"] == expected


def test_fsdp_gets_the_device(joined: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    meshes: list[Any] = []
    monkeypatch.setattr(fsdp, "init_device_mesh", lambda kind, shape: meshes.append((kind, shape)))
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **options: None)
    monkeypatch.setattr(fsdp, "FSDPModule", nn.Module)
    for device in ("cuda", "cpu"):
        build_strategy("fsdp", config(device)).prepare(nn.Linear(2, 2), lambda model: None)  # type: ignore[arg-type, return-value]
    assert meshes == [("cuda", (2,)), ("cpu", (2,))]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_deepspeed_gets_the_device(
    joined: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """It would look for an accelerator by itself, also where a run is to be on the CPU."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    logger = SimpleNamespace(setLevel=lambda level: None)
    library = SimpleNamespace(
        utils=SimpleNamespace(logger=logger, set_z3_leaf_modules=None),
        initialize=lambda **options: (SimpleNamespace(), None),
    )
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", library)
    monkeypatch.setattr("nested_learning.train.compiling.has_bf16", lambda device: True)
    monkeypatch.setattr(deepspeed, "read_settings", lambda config, world_size: {})
    strategy = deepspeed.DeepSpeedStrategy(config(device))
    strategy.prepare(nn.Linear(2, 2), lambda model: None)  # type: ignore[arg-type, return-value]
    assert os.environ["DS_ACCELERATOR"] == device
    monkeypatch.delenv("DS_ACCELERATOR")
