"""The causal convolution against a token loop, in one call and in pieces."""

import pytest
import torch
from tolerances import assert_same
from torch import Tensor

from nested_learning.layers.conv import CausalConv, ConvState


def make(dim: int, window: int) -> CausalConv:
    torch.manual_seed(0)
    conv = CausalConv(dim, window).double()
    with torch.no_grad():
        conv.weight.normal_()
    return conv


def naive(x: Tensor, weight: Tensor) -> Tensor:
    window = weight.shape[1]
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for back in range(min(window, t + 1)):
            y[:, t] += weight[:, window - 1 - back] * x[:, t - back]
    return y


@pytest.mark.parametrize("window", [1, 2, 4, 9])
def test_conv_is_the_token_loop(window: int) -> None:
    conv = make(3, window)
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    assert_same(conv(x)[0], naive(x, conv.weight.detach()), length=window)


def test_gradients_are_those_of_the_token_loop() -> None:
    conv = make(3, 4)
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 7, 3, dtype=torch.float64)
    fast = torch.autograd.grad((conv(x)[0] * g).sum(), (x, conv.weight))
    slow = torch.autograd.grad((naive(x, conv.weight) * g).sum(), (x, conv.weight))
    assert_same(fast, slow, length=2 * 7 * 4)


def test_taps_start_uniform_within_the_root_of_the_window() -> None:
    torch.manual_seed(0)
    weight = CausalConv(1000, 4).weight
    assert weight.abs().max() <= 0.5
    torch.testing.assert_close(weight.std(), torch.tensor(0.5 / 3**0.5), rtol=0.03, atol=0)


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("sizes", [[9], [1] * 9, [2, 1, 6], [8, 1]])
def test_any_split_gives_the_same_outputs_and_state(window: int, sizes: list[int]) -> None:
    conv = make(3, window)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    whole, end = conv(x)
    state: ConvState | None = None
    parts = []
    for piece in x.split(sizes, dim=1):
        y, state = conv(piece, state)
        parts.append(y)
    assert state is not None
    assert_same(torch.cat(parts, dim=1), whole, length=window)
    assert torch.equal(state.inputs, end.inputs)


def test_state_keeps_no_more_memory_than_it_shows() -> None:
    _, state = make(3, 4)(torch.randn(1, 100, 3, dtype=torch.float64))
    assert state.inputs.untyped_storage().nbytes() == 3 * 3 * 8


def test_errors() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        CausalConv(3, 0)
    conv = make(3, 4)
    _, state = conv(torch.zeros(2, 5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="batch of x, 1, got 2"):
        conv(torch.zeros(1, 5, 3, dtype=torch.float64), state)
