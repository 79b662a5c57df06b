"""`memory.error_limit`: no gradient at a memory's output is longer, in any layer with two-layer memories."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from naive_cms import naive_cms
from naive_self_modifying import naive_self_modifying
from tolerances import assert_same
from torch import Tensor, nn

from nested_learning.layers.cms import CMS
from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.ops.memory_mlp import naive
from nested_learning.ops.memory_mlp.chunk import WriteRule

DIM, TOKENS = 8, 11
LIMIT = 0.8  # below the errors of some tokens and above those of others


def config(limit: float | None) -> MemoryConfig:
    return MemoryConfig(eta_max=1.0, eta_bias=0.0, alpha_bias=1.0, momentum=True, error_limit=limit)


def own_outputs(layer: nn.Module, x: Tensor) -> Tensor:
    return naive_self_modifying(layer, x)[0]


LAYERS: dict[str, tuple[Callable[[float | None], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "self_mod": (lambda limit: SelfModifyingTitans(DIM, 2, 4, config=config(limit)), own_outputs),
    "titans": (lambda limit: TitansMemory(DIM, 2, 4, config=config(limit)), own_outputs),
    "fast level": (
        lambda limit: CMS(DIM, (LevelSpec(name="fast", chunk_size=4),), memory=config(limit)),
        lambda layer, x: naive_cms(layer, x)[0],
    ),
}


def make(name: str, limit: float | None) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name][0](limit).double()
    with torch.no_grad():
        for parameter_name, parameter in layer.named_parameters():
            if parameter_name.endswith(("initial_w1", "values.weight")):
                parameter.normal_(std=0.5)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_its_token_loop(name: str) -> None:
    """Outputs and all gradients, with errors on both sides of the limit."""
    layer = make(name, LIMIT)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, TOKENS, DIM, dtype=torch.float64)

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        inputs = [x, *layer.parameters()]
        return torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True, materialize_grads=True)

    y, expected = layer(x)[0], LAYERS[name][1](layer, x)
    assert_same(y, expected, TOKENS * DIM)
    assert_same(gradients(y), gradients(expected), TOKENS * DIM)
    for other in (None, LIMIT / 4):
        assert (make(name, other)(x)[0] - y).abs().max() > 1e-3
    assert_same(make(name, 1e3)(x)[0], make(name, None)(x)[0], TOKENS * DIM)  # no error is that long


def test_gradients_are_those_of_the_objective_of_the_oracle() -> None:
    torch.manual_seed(0)
    differences = torch.randn(50, 3, dtype=torch.float64)
    differences[0] = 0.0
    differences.requires_grad_()
    expected = torch.autograd.grad(naive.objective(differences, LIMIT), differences)[0]
    errors = WriteRule(error_limit=LIMIT).errors(differences)
    assert_same(errors, expected, 3)
    lengths, before = errors.norm(dim=-1), differences.norm(dim=-1)
    assert (before < LIMIT).any() and (before > LIMIT).any()
    assert_same(lengths, before.clamp(max=LIMIT), 3)
    assert torch.autograd.grad(errors.sum(), differences)[0].isfinite().all()


def test_what_does_not_read_it_refuses_it() -> None:
    limited = MemoryConfig(error_limit=1.0)
    for mixer in ("self_mod", "titans"):
        HopeConfig(mixer=mixer, memory=limited)
    for mixer in ("linear", "attention"):
        with pytest.raises(ValueError, match="model.memory.error_limit is not read by model.mixer"):
            HopeConfig(mixer=mixer, memory=limited)
    HopeConfig(mixer="attention", memory=limited, levels=(LevelSpec(name="fast", chunk_size=8),))
    with pytest.raises(ValueError, match=r"^model.memory.error_limit must be positive, got 0.0$"):
        MemoryConfig(error_limit=0.0)
