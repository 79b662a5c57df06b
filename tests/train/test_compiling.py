"""Which runs are compiled by themselves, and what is said where they are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nested_learning.config import load_config
from nested_learning.train import compiling
from nested_learning.train.compiling import WORTHWHILE, missing_compiler, timed_first_call, why_eager

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def reason(*overrides: str, device: torch.device = CPU, strategy: str = "single") -> str | None:
    return why_eager(load_config("pilot_smoke", list(overrides)), device, strategy)


@pytest.fixture(autouse=True)
def with_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: None)


def test_long_runs_are_compiled_and_short_ones_are_not() -> None:
    long = f"train.steps={WORTHWHILE['cpu']}"
    assert reason(long) is None and reason(long, strategy="fsdp") is None
    assert "train.steps = 200 is too short" in (reason() or "")
    assert reason(device=CUDA) is None  # a step gains more there
    assert reason("train.compile=true") is None
    assert reason(long, "train.compile=false") == "train.compile = false"


@pytest.mark.parametrize(
    "overrides, strategy, said",
    [
        (("train.inner=online", "adapt.chunk_size=64"), "single", "train.inner = online"),
        (("optim=dgd",), "single", "optim.name = dgd"),
        ((), "deepspeed", "DeepSpeed"),
    ],
)
def test_what_cannot_be_compiled_says_so(overrides: tuple[str, ...], strategy: str, said: str) -> None:
    assert said in (reason("train.steps=10000", *overrides, strategy=strategy) or "")


def test_a_machine_without_a_compiler_trains_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_compiler(CPU) == "no C++ compiler was found (g++ or clang++)"
    monkeypatch.setattr(compiling, "missing_compiler", missing_compiler)
    assert reason("train.steps=10000") == "no C++ compiler was found (g++ or clang++)"
    compiler = tmp_path / "g++"
    compiler.touch(mode=0o755)
    monkeypatch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert missing_compiler(CPU) == "the headers of Python (Python.h) are not installed"
    (tmp_path / "Python.h").touch()
    assert missing_compiler(CPU) is None


def test_the_first_call_is_timed_and_said() -> None:
    lines: list[str] = []
    step = timed_first_call(lambda value: value + 1, lines.append)
    assert [step(1), step(2)] == [2, 3]
    assert len(lines) == 2 and "compiling" in lines[0] and lines[1].endswith(" s")


def test_true_and_false_are_words_or_booleans() -> None:
    config = load_config("pilot_smoke", ["train.compile=true"])
    assert config.train.compile == "true"
    assert replace(config.train, compile=False).compile == "false"
    with pytest.raises(ValueError, match=r"train\.compile must be one of auto, true, false, got 'maybe'"):
        replace(config.train, compile="maybe")
