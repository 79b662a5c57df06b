"""What `nl doctor` says of a card, with one that only pretends."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nested_learning.bench import card, gpu_kernels
from nested_learning.commands import doctor, nl
from nested_learning.ops import kernels

CUDA = torch.device("cuda")
H100 = {"name": "NVIDIA H100", "total_memory": 80 * 2**30, "multi_processor_count": 132}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Let torch believe in cards of a compute capability."""

    def make(cards: int = 1, capability: tuple[int, int] = (9, 0), nccl: bool = True) -> None:
        major, minor = capability
        properties = SimpleNamespace(**H100, major=major, minor=minor)
        for name, value in {
            "is_available": lambda: cards > 0,
            "device_count": lambda: cards,
            "get_device_properties": lambda number: properties,
            "get_device_capability": lambda device: capability,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        driver = tmp_path / "version"
        driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n")
        monkeypatch.setattr(card, "DRIVER", driver)
        monkeypatch.setattr(card, "rates", lambda device: "700 TFLOP/s")
        monkeypatch.setattr(card, "MODULES", ())

    return make


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """One module of kernels with these differences by type, or one that raises; in this process."""

    def make(differences: dict[str, dict[str, float]] | Exception) -> None:
        def compare(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
            assert device == CUDA
            if isinstance(differences, Exception):
                raise differences
            return differences["fp32" if dtype == torch.float32 else "bf16"]

        def check(module: str, device: str, seconds: float) -> dict[str, Any]:
            assert seconds > 0
            return {dtype: gpu_kernels.check_module(module, device, dtype) for dtype in gpu_kernels.DTYPES}

        found = SimpleNamespace(KERNEL=kernels.Kernel("rule", compare))
        monkeypatch.setitem(sys.modules, "made_up_kernel", found)
        monkeypatch.setattr(card, "MODULES", ("made_up_kernel",))
        monkeypatch.setattr(card, "check_apart", check)

    return make


def test_a_card_and_its_versions(machine: Callable[..., None]) -> None:
    machine()
    lines, problems = card.report(CUDA)
    assert lines == [
        "card      cuda:0, NVIDIA H100, 80 GiB, compute capability 9.0, 132 multiprocessors",
        "versions  driver 580.65.06, CUDA 13.0, cuDNN 91002, NCCL 2.27.3",
        "rates     700 TFLOP/s",
        "kernels   triton (auto)",
    ]
    assert problems == []


def test_without_a_card_there_is_one_line() -> None:
    assert card.report(torch.device("cpu")) == (["kernels   torch: Triton has no code for cpu"], [])


def test_several_cards_need_nccl(machine: Callable[..., None]) -> None:
    machine(cards=2, nccl=False)
    lines, problems = card.report(CUDA)
    assert lines[1].startswith("card      cuda:1, NVIDIA H100") and lines[2].endswith("no NCCL")
    assert problems == ["2 cards, but this torch has no NCCL: several of them cannot train together"]


def test_a_card_that_is_too_old_for_our_kernels(
    machine: Callable[..., None], kernel: Callable[..., None]
) -> None:
    machine(capability=(7, 5))
    kernel(AssertionError("not asked"))
    lines, problems = card.report(CUDA)
    assert lines[-1] == "kernels   torch: the card is older than compute capability 8.0"
    assert problems == []


def test_a_card_that_cannot_compute(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine()

    def broken(device: torch.device) -> str:
        raise torch.AcceleratorError("CUDA error: no kernel image is available\nmore lines")

    monkeypatch.setattr(card, "rates", broken)
    lines, problems = card.report(CUDA)
    assert problems == ["cuda cannot compute: CUDA error: no kernel image is available"]
    assert not any(line.startswith("kernel") for line in lines)


def test_a_kernel_that_is_right(machine: Callable[..., None], kernel: Callable[..., None]) -> None:
    machine()
    kernel({"fp32": {"y": 2e-6, "W": 1e-6}, "bf16": {"y": 4e-3, "W": 8e-3}})
    lines, problems = card.report(CUDA)
    assert lines[-1] == "kernel    made_up_kernel: fp32 off by at most 2.0e-06, bf16 off by at most 8.0e-03"
    assert problems == []


@pytest.mark.parametrize(
    ("differences", "problem"),
    [
        ({"y": 2e-4, "W": 1e-6}, "kernel rule is wrong in fp32: y is off by 0.0002"),
        (
            {"y": 1e9, "W": float("nan"), "k": 2e-4},
            "kernel rule is wrong in fp32: W is off by nan",
        ),
    ],
)
def test_a_kernel_that_is_wrong(
    machine: Callable[..., None], kernel: Callable[..., None], differences: dict[str, float], problem: str
) -> None:
    machine()
    kernel({"fp32": differences, "bf16": {"y": 0.0}})
    lines, problems = card.report(CUDA)
    assert lines[-1].endswith("fp32 wrong, bf16 off by at most 0.0e+00")
    assert problems == [problem]


def test_a_kernel_that_does_not_compile(machine: Callable[..., None], kernel: Callable[..., None]) -> None:
    machine()
    kernel(RuntimeError("out of resource: shared memory\nhint"))
    lines, problems = card.report(CUDA)
    assert lines[-1] == "kernel    made_up_kernel: fp32 wrong, bf16 wrong"
    assert problems == [
        f"kernel rule is wrong in {dtype}: RuntimeError: out of resource: shared memory hint"
        for dtype in ("fp32", "bf16")
    ]


def test_a_choice_is_said(machine: Callable[..., None]) -> None:
    machine()
    try:
        kernels.use_kernels("torch")
        assert card.report(CUDA)[0][-1] == "kernels   torch: chosen"
        kernels.use_kernels("triton")
        assert card.report(CUDA)[0][-1] == "kernels   triton (triton)"
    finally:
        kernels.use_kernels("auto")


def test_rates_count_operations_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors: a millisecond for the product, 10 and 1 for the copies."""
    seconds = iter([1e-3, 1e-2, 1e-3])

    def timed(run: Callable[[], Any], device: str) -> float:
        assert device == "cuda"
        run()
        return next(seconds)

    monkeypatch.setattr(card, "best_seconds", timed)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=False):
        found = card.rates(CUDA)
    product, up, inside = 2 * 8192**3 / 1e-3 / 1e12, 2**28 / 1e-2 / 1e9, 2 * 2**28 / 1e-3 / 1e9
    assert found == (
        f"{product:.0f} TFLOP/s (bfloat16, 8192 x 8192 x 8192), copies {up:.0f} GB/s from pinned memory, "
        f"{inside:.0f} GB/s inside the card"
    )


def test_a_driver_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(card, "DRIVER", tmp_path / "nothing")
    assert card.driver_version() == "unknown"


def test_every_kernel_of_the_library_is_asked() -> None:
    """A module of kernels is one of `MODULES`, and shows how it is checked."""
    folder = Path(kernels.__file__).parent
    files = {f"nested_learning.ops.{path.parent.name}.triton" for path in folder.glob("*/triton.py")}
    assert set(kernels.MODULES) == files
    for name in kernels.MODULES:
        assert isinstance(importlib.import_module(name).KERNEL, kernels.Kernel)


def test_the_doctor_prints_it_and_ends_with_1_for_a_wrong_kernel(
    machine: Callable[..., None],
    kernel: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine()
    kernel(ValueError("wrong"))
    monkeypatch.setattr(doctor, "REQUIRED", ())
    monkeypatch.setattr(doctor, "matmul_rate", lambda: 1.0)
    assert nl.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "NVIDIA H100, 80 GiB\n" in text  # of `device`, as before
    assert text.endswith("kernel rule is wrong in bf16: ValueError: wrong\n")
    kernel({"fp32": {"y": 0.0}, "bf16": {"y": 0.0}})
    assert nl.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("bf16 off by at most 0.0e+00\n\nall good\n")


def test_the_doctor_of_a_machine_without_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "REQUIRED", ())
    monkeypatch.setattr(doctor, "matmul_rate", lambda: 1.0)
    assert nl.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("kernels   torch: Triton has no code for cpu\n\nall good\n")
    names = [line.split()[0] for line in text.splitlines()[1:] if line and line != "all good"]
    assert list(dict.fromkeys(names)) == [
        "device",
        "optional",
        "text",
        "configs",
        "cache",
        "matmul",
        "kernels",
    ]
