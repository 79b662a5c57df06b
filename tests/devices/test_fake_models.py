"""No model on CUDA makes a tensor on the CPU: whole passes, streaming, packed rows and sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_cuda import (
    BLOCK,
    FAST,
    LEVELS,
    MLP,
    SLOW,
    autocast,
    devices_of,
    documents,
    made_on_cuda,
    small,
    tokens,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.mixer import MIXERS
from nested_learning.layers.norm import RMSNorm
from nested_learning.levels import VARIANTS, LevelSpec
from nested_learning.models import lm
from nested_learning.models.block import HopeBlock
from nested_learning.models.generation import Rows
from nested_learning.models.lm import HopeLM
from nested_learning.models.nested_mlp import AuxiliaryHeads, NestedModel
from nested_learning.models.pretrained import PretrainedLevels
from nested_learning.models.sampling import Sampler, sample_token, truncate
from nested_learning.models.tokens import check_tokens
from nested_learning.reproduce.lstm import LSTMConfig, LSTMModel

pytestmark = pytest.mark.usefixtures("fake_cuda")
ALL = (FAST, SLOW, MLP)
QUICK = {("self_mod", "nested")}


def read_in_two_calls(model: nn.Module) -> list[Any]:
    """Logits of two calls, the second from the state of the first, and both states."""
    first, state = model(tokens())
    second, after = model(tokens(length=5), state)
    return [first, second, state, after]


def made(**changes: Any) -> HopeLM:
    return made_on_cuda(lambda: HopeLM(small(**{"levels": ALL, "seq_len": 32, **changes})))


@pytest.mark.parametrize(
    ("mixer", "variant"),
    [
        pytest.param(m, v, marks=() if (m, v) in QUICK else pytest.mark.thorough)
        for m in MIXERS
        for v in VARIANTS
    ],
)
def test_a_model_stays_on_its_device(mixer: str, variant: str) -> None:
    model = made(mixer=mixer, cms_variant=variant)
    assert devices_of(*read_in_two_calls(model), *model(tokens(), documents=documents())) == {"cuda"}
    assert devices_of(model.init_state(2), model.init_state(2, plain=True)) == {"cuda"}


@pytest.mark.thorough
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mixer", ["self_mod_linear", "attention"])
def test_every_level_beside_a_mixer(mixer: str, level: str) -> None:
    model = made(mixer=mixer, levels=(LEVELS[level], MLP) if level != "mlp" else (MLP,))
    assert devices_of(*read_in_two_calls(model)) == {"cuda"}


def test_levels_of_some_blocks_and_a_head_of_its_own() -> None:
    levels = (LevelSpec(name="fast", chunk_size=4, layers=(1,)), MLP)
    model = made(levels=levels, num_layers=2, tie_embeddings=False, memory=MemoryConfig(keep_every=1))
    assert devices_of(*read_in_two_calls(model)) == {"cuda"}


def test_autocast() -> None:
    with autocast():
        found = read_in_two_calls(made(mixer="titans"))
    assert devices_of(*found) == {"cuda"}
    assert found[0].dtype == torch.bfloat16


@pytest.mark.parametrize("mixer", ["self_mod", "sliding_attention"])
def test_a_token_at_a_time(mixer: str) -> None:
    """What `generate` does after its check of the prompt, which needs values."""
    model = made(mixer=mixer, levels=(MLP,))
    new, state = tokens(), None
    for _ in range(6):
        logits, state = model(new, state)
        new = sample_token(logits[:, -1].float(), 0.0)[:, None]
    assert devices_of(new, state) == {"cuda"}
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        model.generate(tokens(), 1)


@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_rows_of_any_length(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short row draws, ends and is dropped; then the long one is read on, and draws."""
    monkeypatch.setattr(lm, "why_no_decoder", lambda *arguments: "graphs need a card")
    whole = torch.zeros(2, 24, dtype=torch.int64, device="cuda")
    rows = Rows(made(mixer=mixer, levels=(MLP,)), whole, [3, 19], Sampler(max_new_tokens=5))
    drawn = list(rows.draws())
    assert [draw.rows for draw in drawn] == [[0]] * 5 + [[1]] * 5
    assert devices_of(*(draw.tokens for draw in drawn), rows.state) == {"cuda"}


@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}]
)
def test_sampling(how: dict[str, Any]) -> None:
    logits = torch.zeros(2, 11, device="cuda")
    assert devices_of(sample_token(logits, **how)) == {"cuda"}
    limits = {name: value for name, value in how.items() if name != "temperature"}
    assert devices_of(truncate(logits, **limits)) == {"cuda"}


def test_tokens_are_checked_without_a_look_at_their_values() -> None:
    check_tokens(tokens())
    block = made_on_cuda(lambda: HopeBlock(small()))
    assert devices_of(*block(torch.zeros(2, BLOCK, 8, device="cuda"))) == {"cuda"}


def test_the_smallest_nested_model() -> None:
    def make() -> tuple[NestedModel, AuxiliaryHeads]:
        model = NestedModel(4, 6, 3)
        return model, AuxiliaryHeads(model, {"level1_fast": 0.5, "level2_medium": 0.5})

    model, heads = made_on_cuda(make)
    x, target = torch.zeros(2, 5, 4, device="cuda"), torch.zeros(2, 5, 3, device="cuda")
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN would ask for its driver
        found = model.activations(x)
        loss = heads(found, target, nn.functional.mse_loss)
        assert devices_of(found, loss, model(x[:, 0])) == {"cuda"}


def test_the_recurrent_contender() -> None:
    model = made_on_cuda(lambda: LSTMModel(LSTMConfig(vocab_size=11, dim=8, num_layers=2)))
    with torch.backends.cudnn.flags(enabled=False):
        assert devices_of(*read_in_two_calls(model)) == {"cuda"}


@pytest.mark.thorough
def test_a_pretrained_model_at_levels() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    levels = [LevelSpec(name="fast", chunk_size=4, layers=(1,))]
    model = made_on_cuda(lambda: PretrainedLevels(transformers.LlamaForCausalLM(config).eval(), levels))
    assert devices_of(*read_in_two_calls(model)) == {"cuda"}
    logits, state = model(tokens(), model.init_state(2, plain=True))
    assert devices_of(logits, state, *model(tokens(length=5), state)) == {"cuda"}


def test_the_check_finds_a_tensor_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that forgets the device makes its tensor on the CPU, and the next operation raises."""

    def forgetful(norm: RMSNorm, x: Tensor) -> Tensor:
        return x * torch.ones(x.shape[-1])

    monkeypatch.setattr(RMSNorm, "forward", forgetful)
    with pytest.raises(RuntimeError, match=r"devices.*cuda.*cpu"):
        read_in_two_calls(made())
