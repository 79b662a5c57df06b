"""An ordinary MLP as a fast weight of each sequence, and tensors of a state by name."""

import pytest
import torch
from tolerances import assert_same

from nested_learning.layers.mlp import SwiGLU, SwiGLUState
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM


def test_every_row_uses_its_own_weights() -> None:
    torch.manual_seed(0)
    layers = [SwiGLU(6, 8).double() for _ in range(3)]
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    state = SwiGLUState(
        torch.stack([layer.w_in.weight for layer in layers]),
        torch.stack([layer.w_out.weight for layer in layers]),
    )
    y, after = layers[0](x, state)
    assert after is state
    for row, layer in enumerate(layers):
        assert_same(y[row : row + 1], layer(x[row : row + 1])[0], length=6 + 8)


def test_the_parameters_as_state_give_the_same_answer() -> None:
    torch.manual_seed(0)
    layer, x = SwiGLU(6, 8).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    assert_same(layer(x, layer.init_state(2))[0], layer(x)[0], length=6 + 8)


def test_low_precision_answers_in_the_precision_of_its_input() -> None:
    torch.manual_seed(0)
    layer, x = SwiGLU(6, 8).bfloat16(), torch.randn(2, 5, 6).bfloat16()
    state = layer.init_state(2)
    assert state.w_in.dtype == torch.float32
    y = layer(x, state)[0]
    assert y.dtype == torch.bfloat16
    assert_same(y, layer(x)[0], length=3, factor=1)


def test_a_state_of_another_batch_is_refused() -> None:
    layer = SwiGLU(6, 8)
    with pytest.raises(ValueError, match="batch of x, 2, got 3"):
        layer(torch.randn(2, 5, 6), layer.init_state(3))


def test_a_model_with_plain_levels_as_state_is_the_same_model() -> None:
    torch.manual_seed(0)
    levels = (LevelSpec(name="fast", chunk_size=4), LevelSpec())
    model = HopeLM(HopeConfig(vocab_size=17, dim=8, num_layers=2, num_heads=2, levels=levels, chunk_size=4))
    model = model.double()
    tokens = torch.randint(17, (2, 11))
    state = model.init_state(2, plain=True)
    names = [name for name in state.named_tensors() if name.endswith("w_in")]
    assert names == ["layers.0.memory.levels.1.w_in", "layers.1.memory.levels.1.w_in"]
    logits, after = model(tokens, state)
    assert_same(logits, model(tokens)[0], length=2 * 11 * 8)
    assert set(names) <= set(after.named_tensors())


def test_replace_changes_what_it_names_and_nothing_else() -> None:
    state = HopeLM(HopeConfig(vocab_size=17, dim=8, num_layers=2, num_heads=2)).init_state(2, plain=True)
    name = "layers.1.memory.levels.0.w_out"
    new = torch.zeros(2, 8, 24)
    changed = state.replace({name: new})
    before, after = state.named_tensors(), changed.named_tensors()
    assert after[name] is new
    assert all(after[key] is before[key] for key in before if key != name)
    assert changed.layers[0] is state.layers[0]
    with pytest.raises(ValueError, match=r"ModelState has no tensor 'layers\.7\.w'"):
        state.replace({"layers.7.w": new})
