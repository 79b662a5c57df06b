"""Every optimizer steps CUDA parameters without a tensor on the CPU, and without a look at a value.

Gradients are set by hand: the backward pass of fake CUDA tensors would ask for a CUDA context.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from on_cuda import FAST, MLP, SLOW, devices_of, made_on_cuda, small
from torch import Tensor, nn
from torch.optim import Optimizer

from nested_learning.models.lm import HopeLM
from nested_learning.models.nested_mlp import NestedModel
from nested_learning.optim import M3, DeepMomentum, DeltaMomentum, LearnedRates, MultiFrequencyOptimizer
from nested_learning.optim.build import MATRIX_OPTIMIZERS, OPTIMIZERS, build_optimizer
from nested_learning.optim.combined import Combined
from nested_learning.optim.config import OptimConfig
from nested_learning.optim.delta_gd import (
    OBJECTIVES,
    DeltaGradientDescent,
    GeneralizedGradientDescent,
    _since_the_pass,
    delta_step,
)
from nested_learning.optim.options import read_options, write_options
from nested_learning.optim.param_groups import param_groups
from nested_learning.optim.per_level import setup_optimizers

pytestmark = pytest.mark.usefixtures("fake_cuda")
M3_OPTIONS: list[dict[str, Any]] = [
    {},
    {"accumulation": "sum", "adjust": "none"},
    {"nesterov": True, "adjust": "match_rms_adamw", "ns_dtype": "param"},
    {"slow_weight": 0.0, "second_moment": False, "adjust": "original"},
    {"eps_inside": False, "adamw": True},
    {"polynomial": "cubic", "ns_dtype": "float32", "slow_every": 1},
]
DELTA_MOMENTUM: list[dict[str, Any]] = [
    *({"delta": name} for name in ("off", "literal", "eta", "normalized", "capped")),
    {"side": "left", "precondition": "diagonal", "features": "tanh", "output": "newton_schulz"},
    *({"features": name, "output": "sign"} for name in ("signed_square", "cube", "sign")),
]
DEEP_MOMENTUM = [{}, {"objective": "l2"}, {"hidden": 0}, {"output": "newton_schulz"}]


@pytest.fixture
def values_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers where a value is asked for that a run knows on the host: counters of steps, which are tensors
    of the CPU, and before the first step of all whether gradients are zero, as they are here."""

    def counter(step: Tensor) -> float:
        assert step.device.type == "cpu"
        return 1.0

    monkeypatch.setattr(import_module("torch.optim.adam"), "_get_value", counter)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: False)


@pytest.fixture(scope="module", autouse=True)
def fused_sgd() -> Iterator[None]:
    """A fake of torch's fused SGD, which has none: it moves its parameters in place."""
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("_fused_sgd_", lambda *arguments, **options: None)
    yield
    library._destroy()


def parameters() -> list[nn.Parameter]:
    """A matrix, a wide one, a vector and a filter."""
    shapes = ((6, 4), (4, 6), (4,), (4, 3, 2))
    return made_on_cuda(lambda: [nn.Parameter(torch.zeros(shape)) for shape in shapes])


def steps(optimizer: Optimizer, count: int = 2) -> list[Any]:
    """Parameters and state after steps with gradients set by hand."""
    own: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(count):
        for p in own:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    return [own, _on_the_device(optimizer)]


def _on_the_device(optimizer: Optimizer) -> list[Any]:
    """State without the counters of torch's own optimizers, which are the host's where nothing is fused."""
    return [
        value for entries in optimizer.state.values() for name, value in entries.items() if name != "step"
    ]


@pytest.mark.usefixtures("values_of_the_host")
@pytest.mark.parametrize("options", M3_OPTIONS)
def test_m3(options: dict[str, Any]) -> None:
    own = [{"params": parameters()}, {"params": parameters(), "adamw": True}]
    assert devices_of(steps(M3(own, **options))) == {"cuda"}


@pytest.mark.parametrize("options", DELTA_MOMENTUM)
def test_delta_momentum(options: dict[str, Any]) -> None:
    assert devices_of(steps(DeltaMomentum(parameters(), **options))) == {"cuda"}


@pytest.mark.parametrize("options", DEEP_MOMENTUM)
def test_deep_momentum(options: dict[str, Any]) -> None:
    assert devices_of(steps(DeepMomentum(parameters(), **options))) == {"cuda"}


@pytest.mark.parametrize("kind", [M3, DeltaMomentum, DeepMomentum])
def test_parameters_in_bf16(kind: Any) -> None:
    own = made_on_cuda(lambda: [nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))])
    assert devices_of(steps(kind(own))) == {"cuda"}


@pytest.mark.parametrize("target", ["gradient", "relative"])
@pytest.mark.parametrize("how", ["exact", "paper"])
def test_delta_gradient_descent(how: str, target: str) -> None:
    """What a layer has read is put in place of a backward pass, which would catch it."""
    model = made_on_cuda(lambda: nn.Linear(4, 3))
    optimizer = DeltaGradientDescent(model, step=how, target=target)
    caught = optimizer.caught[model.weight]
    rows = torch.zeros(5, 4, device="cuda")
    caught.gram, caught.rows, caught.count_of_uses, caught.passes = rows.T @ rows, 5, 1, {0}
    assert devices_of(steps(optimizer, 1)) == {"cuda"}


def test_parts_of_general_gradient_descent() -> None:
    """Its step differentiates, which fake CUDA tensors cannot: `test_stand_in_card.py` has the whole."""
    model = made_on_cuda(lambda: nn.Linear(4, 3))
    GeneralizedGradientDescent(model)
    a, b = torch.zeros(5, 4, device="cuda"), torch.zeros(4, 4, device="cuda")
    found = [objective(a, a) for objective in OBJECTIVES.values()]
    assert devices_of(found, _since_the_pass(b, b), delta_step(a, a, b, 0.1)) == {"cuda"}


@pytest.mark.usefixtures("values_of_the_host")
@pytest.mark.parametrize("name", [*OPTIMIZERS, *MATRIX_OPTIMIZERS])
@pytest.mark.parametrize("slow", [False, True])
def test_the_optimizers_of_a_run(name: str, slow: bool) -> None:
    if name == "dgd":
        pytest.skip("its layers must have read something; test_delta_gradient_descent has its rule")
    model = made_on_cuda(lambda: HopeLM(small(levels=(FAST, SLOW, MLP), seq_len=32)))
    levels = {"slow": (2, model.slow_parameters()["slow"])} if slow else None
    optimizer = build_optimizer(OptimConfig(name=name), model, levels)
    assert devices_of(steps(optimizer, 3)) == {"cuda"}
    write_options(optimizer, read_options(optimizer))
    assert devices_of([group["params"] for group in param_groups(model, 0.1)]) == {"cuda"}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_skipped_update_stays_on_the_device(name: str) -> None:
    """`found_inf`, by which the guard of a run stops updates, is looked at by no one on the host."""
    model = made_on_cuda(lambda: HopeLM(small()))
    optimizer: Any = build_optimizer(OptimConfig(name=name), model)
    assert optimizer._step_supports_amp_scaling
    optimizer.found_inf = torch.ones((), device="cuda")
    assert devices_of(steps(optimizer)) == {"cuda"}


@pytest.mark.usefixtures("values_of_the_host")
@pytest.mark.parametrize("inner", [torch.optim.SGD, M3])
def test_wrappers(inner: Any) -> None:
    fast, slow = parameters(), parameters()
    levels = {"fast": fast, "slow": slow}
    learned = LearnedRates(inner([*fast, *slow], lr=0.1), levels)
    assert devices_of(steps(learned, 3), learned.rates) == {"cuda"}
    many = MultiFrequencyOptimizer(inner([*fast, *slow], lr=0.1), {"slow": 2}, {"slow": slow}, average=True)
    assert devices_of(steps(many, 4)) == {"cuda"}


@pytest.mark.usefixtures("values_of_the_host")
def test_several_as_one() -> None:
    parts = [M3(parameters()), torch.optim.AdamW(parameters(), fused=True)]
    assert devices_of(steps(Combined(parts))) == {"cuda"}


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_one_optimizer_for_every_level(kind: str) -> None:
    model = made_on_cuda(lambda: NestedModel(4, 6))
    periods = {"level1_fast": 1, "level2_medium": 2, "level3_slow": 4}
    for optimizer in setup_optimizers(model, periods, optimizer_type=kind, learn_rates=0.02).values():
        assert devices_of(steps(optimizer)) == {"cuda"}
