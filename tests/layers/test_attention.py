"""Attention against a plain softmax loop; caches that fork, split and move."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import assert_same
from torch import Tensor

from nested_learning.layers.attention import PLAIN, Attention, KVCache, attend
from nested_learning.state import load_state

DIM, HEADS, BASE = 12, 2, 100.0
LENGTH = 20 * DIM  # operations in a row: keys times the width


def make(window: int | None = None, **around: object) -> Attention:
    torch.manual_seed(0)
    return Attention(DIM, HEADS, BASE, window, replace(PLAIN, **around)).double()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def turned(vector: Tensor, position: int) -> Tensor:
    """Rotary embedding of one head vector by complex numbers, written apart from the library."""
    half = len(vector) // 2
    out = torch.zeros_like(vector)
    for i in range(half):
        angle = position * BASE ** (-2 * i / len(vector))
        z = complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = z.real, z.imag
    return out


@torch.no_grad()
def naive(layer: Attention, x: Tensor) -> Tensor:
    """Token by token, head by head, in float64."""
    width = DIM // HEADS
    out = torch.zeros_like(x)
    qs, ks, vs = streams(layer, x).split(DIM, -1)
    for b in range(x.shape[0]):
        for h in range(HEADS):
            rows = slice(h * width, (h + 1) * width)
            q = [turned(qs[b, t, rows], t) for t in range(x.shape[1])]
            k = [turned(ks[b, t, rows], t) for t in range(x.shape[1])]
            for t in range(x.shape[1]):
                first = 0 if layer.window is None else max(0, t - layer.window + 1)
                weights = [math.exp(float(q[t] @ k[s]) / math.sqrt(width)) for s in range(first, t + 1)]
                for s, weight in zip(range(first, t + 1), weights, strict=True):
                    out[b, t, rows] += weight / sum(weights) * vs[b, s, rows]
    if layer.gate is not None:
        out = out / (1 + torch.exp(-(x @ layer.gate.weight.T)))
    return out @ layer.w_out.weight.T


def streams(layer: Attention, x: Tensor) -> Tensor:
    """Queries, keys and values before the heads, the convolution tap by tap."""
    projected = x @ layer.w_qkv.weight.T
    if layer.conv is not None:
        taps, plain = layer.conv.weight, projected
        projected = torch.zeros_like(plain)
        for t in range(x.shape[1]):
            for lag in range(min(taps.shape[1], t + 1)):
                projected[:, t] += taps[:, taps.shape[1] - 1 - lag] * plain[:, t - lag]
    if layer.around.activation == "silu":
        projected = projected / (1 + torch.exp(-projected))
    return projected


AROUND = [{"output_gate": True}, {"conv_window": 3}, {"activation": "silu"}]
AROUND.append({"output_gate": True, "conv_window": 4, "activation": "silu"})


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("window", [None, 3])
def test_what_stands_around_attention_is_the_naive_loop_in_any_split(
    window: int | None, around: dict[str, object]
) -> None:
    layer, x = make(window, **around), tokens(2, 11)
    expected = naive(layer, x)
    assert_same(layer(x)[0], expected, LENGTH)
    with torch.no_grad():
        state, parts = layer.init_state(2), []
        for part in x.split([1, 5, 1, 1, 3], 1):
            y, state = layer(part, state)
            parts.append(y)
    assert_same(torch.cat(parts, 1), expected, LENGTH)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 11, 20])
def test_attention_is_the_naive_loop(window: int | None) -> None:
    layer, x = make(window), tokens(2, 11)
    assert_same(layer(x)[0], naive(layer, x), LENGTH)


@pytest.mark.parametrize("window", [1, 4, 5, 7])
@pytest.mark.parametrize("length", [8, 13, 20])
@pytest.mark.parametrize("past", [0, 2, 6])
def test_blocks_equal_the_dense_band_with_gradients(window: int, length: int, past: int) -> None:
    past = min(past, window - 1)
    torch.manual_seed(1)
    q, k, v, g = (torch.randn(2, 2, past + length, 4, dtype=torch.float64) for _ in range(4))
    q, g = q[:, :, past:], g[:, :, past:]
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    fast = attend(*inputs, window=window)
    distance = torch.arange(past, past + length)[:, None] - torch.arange(past + length)[None]
    hidden = (distance < 0) | (distance >= window)
    scores = (inputs[0] @ inputs[1].transpose(-1, -2) / 2).masked_fill(hidden, -torch.inf)
    dense = scores.softmax(dim=-1) @ inputs[2]
    assert_same(fast, dense, LENGTH)
    expected = torch.autograd.grad(dense, inputs, g)
    scale = max(float(t.abs().max()) for t in expected)  # queries and keys of a window of 1 have gradient 0
    assert_same(torch.autograd.grad(fast, inputs, g), expected, LENGTH, scale=scale)


@pytest.mark.parametrize("window", [None, 3])
def test_the_past_does_not_see_the_future(window: int | None) -> None:
    layer, x = make(window), tokens(2, 10)
    y, _ = layer(x)
    for t in range(10):
        changed = x.clone()
        changed[:, t] += 1
        other, _ = layer(changed)
        assert torch.equal(other[:, :t], y[:, :t])
        assert not torch.equal(other[:, t], y[:, t])


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_forgets_what_left_it(window: int) -> None:
    layer, x = make(window), tokens(1, 10)
    changed = x.clone()
    changed[:, 2] += 1
    torch.testing.assert_close(
        layer(changed)[0][:, 2 + window :], layer(x)[0][:, 2 + window :], rtol=0, atol=0
    )


SPLITS = [[1] * 17, [17], [5, 12], [1, 16], [9, 1, 1, 1, 5], [2, 3, 2, 3, 7], [12, 4, 1]]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 16, 40])
@pytest.mark.parametrize("sizes", SPLITS)
def test_any_split_gives_the_same_outputs(grad: bool, window: int | None, sizes: list[int]) -> None:
    layer, x = make(window), tokens(2, 17)
    whole, end = layer(x)
    state: KVCache | None = None
    parts = []
    with torch.set_grad_enabled(grad):
        for piece in x.split(sizes, dim=1):
            y, state = layer(piece, state)
            parts.append(y)
    assert state is not None
    assert_same(torch.cat(parts, dim=1), whole, LENGTH)
    assert state.position == end.position == 17
    assert_same(state.tensors(), end.tensors(), LENGTH)


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_flow_through_the_carried_state(window: int | None) -> None:
    layer, x = make(window), tokens(2, 9).requires_grad_()
    g = tokens(2, 9)
    whole = torch.autograd.grad((layer(x)[0] * g).sum(), (x, layer.w_qkv.weight))
    first, state = layer(x[:, :5])
    second, _ = layer(x[:, 5:], state)
    split = torch.autograd.grad((torch.cat([first, second], 1) * g).sum(), (x, layer.w_qkv.weight))
    assert_same(split, whole, LENGTH)
    second, _ = layer(x[:, 5:], state.detach())
    (cut,) = torch.autograd.grad(second.sum(), (x,))
    assert torch.equal(cut[:, :5], torch.zeros_like(cut[:, :5]))


@pytest.mark.parametrize("window", [None, 8])
def test_with_gradients_nothing_is_written_in_place(window: int | None) -> None:
    """Read a prompt without gradients, which leaves spare room, then train on token after token."""
    layer, x = make(window), tokens(2, 9)
    with torch.no_grad():
        _, prompt = layer(x[:, 3:5], layer(x[:, :3])[1])
    assert prompt.keys.shape[2] == 10
    kept = prompt.keys.clone()
    whole, _ = layer(x[:, 5:], prompt)
    expected = torch.autograd.grad(whole.sum(), layer.w_qkv.weight)[0]
    parts, state = [], prompt
    for t in range(5, 9):
        y, state = layer(x[:, t : t + 1], state)
        parts.append(y)
    found = torch.autograd.grad(torch.cat(parts, 1).sum(), layer.w_qkv.weight)[0]
    assert_same(found, expected, LENGTH)
    torch.testing.assert_close(prompt.keys, kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_forks_see_their_own_prefix_only(window: int | None) -> None:
    """A random tree of states: each must continue as if its own tokens had been read alone."""
    layer = make(window)
    pick = torch.Generator().manual_seed(3)
    first = tokens(2, 3)
    tree = [(first, layer(first)[1])]
    for _ in range(40):
        seen, state = tree[int(torch.randint(len(tree), (1,), generator=pick))]
        way = int(torch.randint(4, (1,), generator=pick))
        moved = [state, state.detach(), state.to("cpu"), state.rows(torch.tensor([0, 1]))][way]
        new = tokens(2, int(torch.randint(1, 4, (1,), generator=pick)))
        y, after = layer(new, moved)
        seen = torch.cat([seen, new], dim=1)
        assert_same(y, layer(seen)[0][:, -new.shape[1] :], LENGTH)
        tree += [(seen, after), (seen[:, : -new.shape[1]], moved)]
    for seen, state in tree:
        new = tokens(2, 1)
        expected = layer(torch.cat([seen, new], dim=1))[0][:, -1:]
        assert_same(layer(new, state)[0], expected, LENGTH)


@torch.no_grad()
def test_decoding_copies_rarely_and_a_fork_copies_at_once() -> None:
    layer = make()
    _, state = layer(tokens(1, 4))
    copies = 0
    for _ in range(200):
        before = state
        _, state = layer(tokens(1, 1), state)
        copies += state.keys is not before.keys
    assert (copies, state.keys.shape[2]) == (6, 382)  # 10, 22, 46, 94, 190, 382 slots
    _, left = layer(tokens(1, 1), state)
    _, right = layer(tokens(1, 1), state)
    assert left.keys is state.keys and right.keys is not state.keys


@torch.no_grad()
def test_a_window_bounds_the_memory() -> None:
    layer = make(window=5)
    _, state = layer(tokens(1, 100))
    assert state.keys.untyped_storage().nbytes() == 4 * DIM * 8
    for _ in range(50):
        _, state = layer(tokens(1, 1), state)
        assert state.keys.shape[2] <= 10
    assert (state.position, state.live, state.numel()) == (150, 4, 2 * 4 * DIM)


@torch.no_grad()
def test_rows_select_repeat_and_reorder() -> None:
    layer, x, new = make(), tokens(3, 6), tokens(4, 2)
    index = torch.tensor([2, 0, 0, 1])
    _, state = layer(x[:, 5:], layer(x[:, :5])[1])  # with spare room
    y, _ = layer(new, state.rows(index))
    expected = layer(torch.cat([x[index], new], dim=1))[0][:, 6:]
    assert_same(y, expected, LENGTH)


@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_a_saved_state_continues(window: int | None, tmp_path: Path) -> None:
    layer, x = make(window), tokens(1, 9)
    _, state = layer(x[:, 5:6], layer(x[:, :5])[1])
    state.save(tmp_path / "state.pt")
    loaded = load_state(tmp_path / "state.pt")
    assert loaded.position == 6
    for _ in range(2):  # twice: the second read is a fork
        assert torch.equal(layer(x[:, 6:], loaded)[0], layer(x[:, 6:], state)[0])


def test_a_state_made_in_inference_mode_can_be_carried_on() -> None:
    layer, x = make(), tokens(1, 9)
    with torch.inference_mode():
        _, state = layer(x[:, 5:6], layer(x[:, :5])[1])
    with torch.no_grad():
        y, _ = layer(x[:, 6:7], state)
    assert_same(y, layer(x)[0][:, 6:7], LENGTH)


def test_low_precision_keeps_its_dtype_and_rotates_in_float32() -> None:
    torch.manual_seed(0)
    layer, x = Attention(DIM, HEADS, BASE), torch.randn(2, 300, DIM)
    exact = layer.double()(x.double())[0]
    rough, state = layer.bfloat16()(x.bfloat16())
    assert rough.dtype == state.keys.dtype == torch.bfloat16
    assert float((rough.double() - exact).detach().abs().max()) < 0.02


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_heads must divide dim / 2 = 6, got 4"):
        Attention(12, 4)
    with pytest.raises(ValueError, match="window must be at least 1 or None, got 0"):
        Attention(12, 2, window=0)
    layer = make()
    _, state = layer(tokens(2, 3))
    with pytest.raises(ValueError, match="batch of x, 1, got 2"):
        layer(tokens(1, 1), state)
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 5, 4)
    with pytest.raises(ValueError, match="at most window - 1 = 1 past keys, got 3"):
        attend(q, k, k, window=2)
