"""Compiled models: the numbers of eager ones, no second compilation, no unrolled loop over chunks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tolerances import assert_same
from torch._dynamo.testing import CompileCounterWithBackend

from nested_learning.layers.config import MemoryConfig
from nested_learning.levels import LevelSpec
from nested_learning.models.compile import compile_model
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM
from nested_learning.ops.scan import compiled

FAST = (LevelSpec(name="fast", chunk_size=4), LevelSpec())
CASES = {
    "self_mod": {},
    "momentum": {"memory": MemoryConfig(momentum=True)},
    "recomputed": {"memory": MemoryConfig(keep_every=2)},
    "two_chunk_sizes": {"memory": MemoryConfig(projection_chunk_size=2)},
    "after_write": {"read": "after_write", "levels": FAST},
    "linear": {"mixer": "linear"},
    "self_mod_linear": {"mixer": "self_mod_linear"},
}


@pytest.fixture(autouse=True)
def eager_afterwards() -> Iterator[None]:
    compiled.cache_clear()
    yield
    compiled.cache_clear()
    torch.compiler.reset()


def make(**options: object) -> tuple[HopeLM, torch.Tensor]:
    torch.manual_seed(0)
    config = HopeConfig(vocab_size=31, dim=16, num_layers=2, num_heads=2, chunk_size=4, **options)
    return HopeLM(config), torch.randint(31, (2, 12))


def gradients(model: torch.nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(tokens)[0].logsumexp(-1).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiled_model_gives_the_same_gradients_and_compiles_once(case: str) -> None:
    model, tokens = make(**CASES[case])
    expected = gradients(model, tokens)
    compile_model(model)
    assert_same(gradients(model, tokens), expected, length=2 * 12 * 16, factor=10)
    with torch.compiler.set_stance("fail_on_recompile"):
        gradients(model, tokens)


@pytest.mark.parametrize("mixer", ["self_mod", "self_mod_linear", "titans", "linear"])
def test_torch_compile_as_people_write_it_does_not_unroll_the_loop_over_chunks(mixer: str) -> None:
    """Twice the chunks are no more graphs and hardly more operations (cuts); the logits stay the same."""
    graphs, operations = [], []
    for chunks in (3, 6):
        torch.compiler.reset()
        model, _ = make(mixer=mixer, levels=FAST)
        tokens = torch.randint(31, (2, 4 * chunks))
        counter = CompileCounterWithBackend("eager")
        whole = torch.compile(model, backend=counter, dynamic=False)
        assert_same(whole(tokens)[0], model(tokens)[0], length=tokens.numel() * 16, factor=10)
        assert counter.op_count > 100  # the chunks did go through the compiler
        graphs.append(counter.frame_count)
        operations.append(counter.op_count)
    assert graphs[0] == graphs[1]
    assert operations[1] - operations[0] < 30 * 3  # what cuts three more chunks out; to write one takes more
