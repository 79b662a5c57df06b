"""No layer makes a tensor on the CPU when it is on CUDA, whatever its options are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from on_cuda import (
    BLOCK,
    FAST,
    LENGTH,
    LEVELS,
    MEMORIES,
    MLP,
    SLOW,
    autocast,
    devices_of,
    documents,
    made_on_cuda,
    small,
)
from torch import Tensor, nn

from nested_learning.layers.attention import Attention
from nested_learning.layers.cms import CMS, FastLevel
from nested_learning.layers.config import READS, MemoryConfig
from nested_learning.layers.conv import CausalConv
from nested_learning.layers.documents import locate_documents
from nested_learning.layers.linear import GatedDeltaRule
from nested_learning.layers.memory import MemoryMLP
from nested_learning.layers.mixer import MIXERS
from nested_learning.layers.mlp import SwiGLU
from nested_learning.layers.norm import RMSNorm
from nested_learning.layers.self_modifying import SelfModifyingTitans, TitansMemory
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear
from nested_learning.levels import VARIANTS, LevelSpec
from nested_learning.ops.delta_rule import naive as naive_delta_rule
from nested_learning.ops.memory_mlp import naive as naive_memory_mlp
from nested_learning.ops.newton_schulz import newton_schulz, newton_schulz_all
from nested_learning.ops.self_modifying_linear import naive as naive_shared_gain
from nested_learning.ops.triangular.inverse import inverse_unit_lower

pytestmark = pytest.mark.usefixtures("fake_cuda")
WITH_MEMORIES = ("self_mod", "self_mod_linear", "titans", "linear")
QUICK = {
    ("self_mod", "short projections"),
    ("self_mod_linear", "injection cap"),
    ("titans", "error limit"),
    ("linear", "momentum"),
}


def reads_option(mixer: str, name: str) -> bool:
    """Whether a mixer reads every option that a case of `MEMORIES` sets."""
    given, plain = MEMORIES[name], MEMORIES["plain"]
    changed = [f for f in plain.__dataclass_fields__ if getattr(given, f) != getattr(plain, f)]
    return all(f"memory.{f}" in MIXERS[mixer].reads for f in changed)


CASES = [
    pytest.param(mixer, name, marks=() if (mixer, name) in QUICK else pytest.mark.thorough)
    for mixer in WITH_MEMORIES
    for name in MEMORIES
    if reads_option(mixer, name)
]


def x(length: int = LENGTH, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(2, length, 8, device="cuda", dtype=dtype)


def read(layer: nn.Module, apart: bool = True) -> list[Any]:
    """Answers and states: of two calls in a row, of one from `init_state`, and of a row of documents."""
    y, state = layer(x())
    again, after = layer(x(5), state)
    found = [y, state, again, after, *layer(x(1), layer.init_state(2))]
    return [*found, *layer(x(), None, locate_documents(documents(), BLOCK))] if apart else found


@pytest.mark.parametrize(("mixer", "name"), CASES)
def test_every_option_of_the_memories(mixer: str, name: str) -> None:
    layer = made_on_cuda(lambda: MIXERS[mixer].build(small(mixer, memory=MEMORIES[name])))
    assert devices_of(*read(layer)) == {"cuda"}


@pytest.mark.parametrize("mixer", WITH_MEMORIES[:3])
@pytest.mark.parametrize("how", READS)
@pytest.mark.thorough
def test_every_read(mixer: str, how: str) -> None:
    layer = made_on_cuda(lambda: MIXERS[mixer].build(small(mixer, read=how)))
    assert devices_of(*read(layer)) == {"cuda"}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("around", [{}, {"output_gate": True}, {"conv_window": 4, "activation": "silu"}])
def test_attention(window: int | None, around: dict[str, Any]) -> None:
    mixer = "attention" if window is None else "sliding_attention"
    layer = made_on_cuda(lambda: MIXERS[mixer].build(small(mixer, **around)))
    assert isinstance(layer, Attention)
    assert devices_of(*read(layer)) == {"cuda"}


@pytest.mark.parametrize("mixer", WITH_MEMORIES)
@pytest.mark.thorough
def test_what_stands_around_memories(mixer: str) -> None:
    layer = made_on_cuda(
        lambda: MIXERS[mixer].build(small(mixer, output_gate=False, conv_window=1, activation="silu"))
    )
    assert devices_of(*read(layer)) == {"cuda"}


@pytest.mark.parametrize("level", LEVELS)
def test_every_level(level: str) -> None:
    layer = made_on_cuda(lambda: CMS(8, (LEVELS[level],), seq_len=32))
    assert devices_of(*read(layer)) == {"cuda"}
    assert devices_of(layer.init_state(2, plain=True)) == {"cuda"}


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_system(variant: str) -> None:
    heads = 2 if variant == "independent" else 1
    slower = replace(FAST, name="slower", chunk_size=8)
    layer = made_on_cuda(lambda: CMS(8, (FAST, slower, SLOW, MLP), variant, seq_len=32, heads=heads))
    y, state = layer(x(), layer.init_state(2, plain=True))
    assert devices_of(y, state, *layer(x(5), state)) == {"cuda"}


@pytest.mark.thorough
@pytest.mark.parametrize("name", [n for n in MEMORIES if n in ("momentum and start", "error limit", "eta")])
def test_options_of_fast_levels(name: str) -> None:
    given = replace(MEMORIES[name], projection_eta_max=None)
    assert devices_of(*read(made_on_cuda(lambda: FastLevel(8, FAST, given, reset_every=8)))) == {"cuda"}


def test_layers_without_options() -> None:
    conv, norm, mlp = made_on_cuda(lambda: (CausalConv(8, 4), RMSNorm(8), SwiGLU(8, 8)))
    y, state = conv(x())
    found = [y, state, conv(x(1), state), norm(x()), *mlp(x()), *mlp(x(), mlp.init_state(2, plain=True))]
    assert devices_of(*found) == {"cuda"}
    assert devices_of(list(made_on_cuda(lambda: MemoryMLP(2, 4, 4, 4)).parameters())) == {"cuda"}


def test_states_move_to_and_from_the_device() -> None:
    layer = made_on_cuda(lambda: MIXERS["titans"].build(small("titans")))
    state = layer(x())[1]
    rows = state.rows(torch.zeros(3, dtype=torch.long, device="cuda"))
    from_cpu = state.rows(torch.zeros(3, dtype=torch.long))  # an index may be the host's
    begins = torch.zeros(2, dtype=torch.bool, device="cuda")
    assert devices_of(rows, from_cpu, state.detach(), state.replace_rows(begins, state)) == {"cuda"}
    assert devices_of(state.to("cpu")) == {"cpu"}
    assert devices_of(state.to("cpu").to("cuda")) == {"cuda"}


def test_a_state_of_another_device_is_refused_by_name() -> None:
    layer = made_on_cuda(lambda: MIXERS["titans"].build(small("titans")))
    state = layer(x())[1].to("cpu")
    with pytest.raises(ValueError, match=r"must be on the device of x, cuda:0, got cpu"):
        layer(x(5), state)


@pytest.mark.parametrize("mixer", MIXERS)
def test_bf16_weights(mixer: str) -> None:
    """Memories stay in float32, so types are mixed in many places."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = made_on_cuda(lambda: MIXERS[mixer].build(small(mixer)))
    finally:
        torch.set_default_dtype(torch.float32)
    y, state = layer(x(5, torch.bfloat16))
    again, _ = layer(x(2, torch.bfloat16), state)
    assert devices_of(y, again, state) == {"cuda"}
    assert y.dtype == again.dtype == torch.bfloat16


@pytest.mark.parametrize("mixer", MIXERS)
def test_autocast(mixer: str) -> None:
    layer = made_on_cuda(lambda: MIXERS[mixer].build(small(mixer)))
    with autocast():
        y, state = layer(x(5))
        again, _ = layer(x(2), state)
    assert devices_of(y, again, state) == {"cuda"}
    assert y.dtype == again.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 4, 4)])
def test_newton_schulz(shape: tuple[int, ...]) -> None:
    matrix = torch.zeros(shape, device="cuda")
    assert devices_of(newton_schulz(matrix)) == {"cuda"}
    assert devices_of(newton_schulz_all([matrix, matrix], 5, "quintic", torch.bfloat16)) == {"cuda"}


def test_the_token_loops_that_kernels_are_compared_with() -> None:
    q = torch.zeros(2, 5, 4, device="cuda")
    rates = (q[..., 0], q[..., 0], None)
    weights = torch.zeros(2, 4, 4, device="cuda")
    found = naive_delta_rule.delta_rule(q, q, q, rates, weights, chunk_size=2, objective="dot", read="chunk")
    written = naive_shared_gain.write_memory(weights, q, q, rates, chunk_size=2)
    assert devices_of(found, written, naive_shared_gain.cap_steps(q[..., 0], q[..., 0], q)) == {"cuda"}
    assert devices_of(naive_memory_mlp.predict((weights, weights), q[:, 0])) == {"cuda"}


@pytest.mark.parametrize("chunk", [3, 64])
def test_the_inverse_of_a_triangle(chunk: int) -> None:
    strict = torch.zeros(2, chunk, chunk, device="cuda")
    assert devices_of(inverse_unit_lower(strict)) == {"cuda"}


def test_what_stands_around_the_kernel_of_the_linear_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself needs data: its place is taken by one that writes nothing."""
    pytest.importorskip("triton")
    from nested_learning.ops.delta_rule import triton

    launched: list[Tensor] = []

    def launch(keep: Tensor, turn: Tensor, added: Tensor, backwards: bool) -> Tensor:
        launched.extend((keep, turn, added))
        return torch.empty_like(added)

    monkeypatch.setattr(triton, "launch", launch)
    monkeypatch.setattr(triton, "right", lambda *about: True)
    monkeypatch.setattr("nested_learning.layers.linear.use_triton", lambda device: device.type == "cuda")
    layer = made_on_cuda(lambda: MIXERS["linear"].build(small("linear", chunk_size=16)))
    y, state = layer(x(37))
    assert devices_of(y, state, layer(x(20), state), launched) == {"cuda"}
    assert len(launched) == 6  # both calls


def test_what_stands_around_the_kernels_of_a_fast_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels themselves need data: nothing is launched. Levels that start anew go through them, too."""
    pytest.importorskip("triton")
    from nested_learning.ops.cms import triton

    given: list[Tensor] = []
    monkeypatch.setattr(triton.Launches, "_launch", lambda self, *about: given.extend(about[4:]))
    monkeypatch.setattr(triton, "right", lambda *about: True)
    monkeypatch.setattr("nested_learning.layers.cms.use_triton", lambda device: device.type == "cuda")
    spec = LevelSpec(name="fast", chunk_size=16)
    for reset_every in (None, 32):
        level = made_on_cuda(lambda every=reset_every: FastLevel(32, spec, MemoryConfig(), every))
        given.clear()
        y, state = level(torch.zeros(2, 84, 32, device="cuda"))
        again = level(torch.zeros(2, 20, 32, device="cuda"), state)
        assert devices_of(y, state, again, given) == {"cuda"} and len(given) > 20
    tokens = (torch.zeros(3, 2, 16, *width, device="cuda") for width in ((32,), (32,), (), ()))
    launches = triton.Launches(triton._prepared(*tokens), "bf16")
    weights = [torch.zeros(4, 2, *shape, device="cuda") for shape in ((16, 32), (32, 16))]
    given.clear()
    assert devices_of(launches.back(tuple(weights), tuple(weights)), given) == {"cuda"} and len(given) > 20


def test_the_classes_are_those_of_the_table() -> None:
    made = {name: type(made_on_cuda(lambda name=name: MIXERS[name].build(small(name)))) for name in MIXERS}
    assert made == {
        "self_mod": SelfModifyingTitans,
        "self_mod_linear": SelfModifyingLinear,
        "titans": TitansMemory,
        "linear": GatedDeltaRule,
        "attention": Attention,
        "sliding_attention": Attention,
    }
