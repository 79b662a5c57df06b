"""What a run chooses by its device, and what is said about it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nested_learning.config import load_config
from nested_learning.train import compiling
from nested_learning.train.compiling import (
    WORTH_A_GRAPH,
    WORTHWHILE,
    describe_steps,
    has_bf16,
    missing_compiler,
    settle,
    timed_first_call,
    why_eager,
    why_no_graph,
)

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
    assert replace(config.train, compile=False, graphs=True).compile == "false"
    assert load_config("pilot_smoke", ["train.graphs=false"]).train.graphs == "false"
    with pytest.raises(ValueError, match=r"train\.compile must be one of auto, true, false, got 'maybe'"):
        replace(config.train, compile="maybe")


def no_graph(*overrides: str, device: torch.device = CUDA, strategy: str = "single") -> str | None:
    return why_no_graph(load_config("pilot_smoke", list(overrides)), device, strategy)


def test_one_card_runs_graphs_and_short_runs_do_not() -> None:
    assert (
        no_graph() is None
        and no_graph("parallel=checkpointing", "data.loader.packing=true", "data.loader.crossing=false")
        is None
    )
    assert no_graph("train.graphs=true", "train.steps=1") is None
    short = f"train.steps = {WORTH_A_GRAPH - 1} is too short to gain from them"
    assert no_graph(f"train.steps={WORTH_A_GRAPH - 1}") == short
    assert no_graph("train.graphs=false") == "train.graphs = false"
    assert no_graph(device=CPU) == "cpu has none"


@pytest.mark.parametrize(
    "overrides, device, strategy, said",
    [
        (("train.inner=online", "adapt.chunk_size=64"), CUDA, "single", "train.inner = online"),
        (("optim=dgd",), CUDA, "single", "optim.name = dgd"),
        ((), CUDA, "ddp", "ddp exchanges gradients"),
        ((), CUDA, "fsdp", "fsdp exchanges gradients"),
        ((), CPU, "single", "cpu has none"),
    ],
)
def test_what_cannot_be_a_graph_says_so_and_is_refused(
    overrides: tuple[str, ...], device: torch.device, strategy: str, said: str
) -> None:
    assert said in (no_graph(*overrides, device=device, strategy=strategy) or "")
    with pytest.raises(
        ValueError, match=f"train.graphs must be auto or false for this run, got true: .*{said}"
    ):
        no_graph("train.graphs=true", *overrides, device=device, strategy=strategy)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A CUDA card of compute capability `card.major`.0."""
    found = SimpleNamespace(major=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (found.major, 0))
    return found


def settled(*overrides: str, device: torch.device = CUDA) -> str:
    return settle(load_config("pilot", list(overrides)), device).train.precision


def test_precision_is_bf16_on_cards_that_have_it_and_fp32_elsewhere(card: SimpleNamespace) -> None:
    assert settled() == "bf16" and has_bf16(CUDA)
    assert settled(device=CPU) == "fp32" == settled("train.precision=fp32")
    assert settled("train.precision=bf16", device=CPU) == "bf16"
    card.major = 7
    assert settled() == "fp32" and not has_bf16(CUDA)


def test_triton_is_refused_where_it_cannot_work(card: SimpleNamespace) -> None:
    assert settle(load_config("pilot", ["train.kernels=triton"]), CUDA).train.kernels == "triton"
    with pytest.raises(ValueError, match=r"train\.kernels must be auto or torch .* no code for cpu"):
        settle(load_config("pilot", ["train.kernels=triton"]), CPU)
    card.major = 7
    with pytest.raises(ValueError, match=r"train\.kernels must be .* compute capability 8"):
        settle(load_config("pilot", ["train.kernels=triton"]), CUDA)


def test_pilot_needs_no_flag_to_be_fast_on_a_card(card: SimpleNamespace) -> None:
    config = settle(load_config("pilot"), CUDA)
    eager, ungraphed = why_eager(config, CUDA, "single"), why_no_graph(config, CUDA, "single")
    line = describe_steps(config, CUDA, eager, ungraphed)
    assert line == "steps: bf16, compiled, as CUDA graphs, Triton kernels"


def test_a_line_says_what_was_not_chosen_and_why() -> None:
    config = settle(load_config("pilot_smoke", ["train.kernels=torch"]), CPU)
    eager, ungraphed = why_eager(config, CPU, "single"), why_no_graph(config, CPU, "single")
    assert describe_steps(config, CPU, eager, ungraphed) == (
        "steps: fp32, not compiled (train.steps = 200 is too short to gain from compiling), "
        "no CUDA graphs (cpu has none), no Triton kernels (train.kernels = torch)"
    )
    config = settle(load_config("pilot_smoke"), CPU)
    assert describe_steps(config, CPU, None, None).endswith("no Triton kernels (Triton has no code for cpu)")
