"""Causal multi-head attention with rotary positions, full or over a sliding window.

Shapes: B batch, H heads, d width of a head, T new tokens, S keys they may see (past and new), W window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.layers.checks import check_held, check_input, check_kind
from nested_learning.layers.config import Around
from nested_learning.layers.conv import CausalConv, ConvState
from nested_learning.layers.documents import Documents, check_documents
from nested_learning.layers.streams import activate, make_gate
from nested_learning.state import State, TensorFn

PLAIN = Around(output_gate=False, conv_window=1)
"""Around attention as in a Transformer: nothing."""


@dataclass(frozen=True)
class KVCache(State):
    """Keys and values of the tokens read so far.

    Without gradients the buffers have room to spare, so that a token costs one write and not a copy of the
    whole past. States grown from one another share buffers; `used` says how many slots any of them has
    filled. A state whose own `length` equals `used` may write on. An older one (a fork) copies first, so
    every state keeps seeing its own prefix.

    Args:
        keys, values: `[B, H, capacity, d]`, keys already rotated; slots from `length` on are not ours.
        length: slots that belong to this state.
        position: tokens read since the start of the context.
        keep: past tokens still visible (window - 1), or None for all.
        used: one integer on the CPU, shared by all the states that share the buffers.
        conv: of the causal convolution before the heads; None where there is none.
    """

    keys: Tensor
    values: Tensor
    length: int
    position: int
    keep: int | None
    used: Tensor
    conv: ConvState | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, position: int, keep: int | None) -> Self:
        """A cache without spare room: it never writes into these tensors, so they may be shared."""
        length = keys.shape[2]
        return cls(keys, values, length, position, keep, torch.tensor(length, device="cpu"))

    @property
    def live(self) -> int:
        """How many of the past tokens the next one can see."""
        return self.length if self.keep is None else min(self.length, self.keep)

    def map(self, fn: TensorFn) -> Self:
        """The same cache with `fn` applied to the visible keys and values, without spare room."""
        start = self.length - self.live
        keys, values = (fn(t[:, :, start : self.length].contiguous()) for t in (self.keys, self.values))
        conv = None if self.conv is None else self.conv.map(fn)
        return replace(self.of(keys, values, self.position, self.keep), conv=conv)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Self]:
        """Add `keys`, `values [B, H, T, d]`.

        Returns:
            All keys and values that the new tokens may see, `[B, H, live + T, d]`, and the next cache.
        """
        tokens = keys.shape[2]
        start, end = self.length - self.live, self.length + tokens
        position = self.position + tokens
        if self._has_room(tokens):
            self.keys[:, :, self.length : end] = keys
            self.values[:, :, self.length : end] = values
            self.used.fill_(end)
            grown = replace(self, length=end, position=position)
            return self.keys[:, :, start:end], self.values[:, :, start:end], grown
        keys = torch.cat([self.keys[:, :, start : self.length], keys], dim=2)
        values = torch.cat([self.values[:, :, start : self.length], values], dim=2)
        if torch.is_grad_enabled() or (self.keep is not None and tokens > self.keep):
            return keys, values, self.of(*_last(keys, values, self.keep), position, self.keep)
        used = torch.tensor(end - start, device="cpu")
        grown = type(self)(_roomy(keys), _roomy(values), end - start, position, self.keep, used)
        return keys, values, grown

    def _has_room(self, tokens: int) -> bool:
        if torch.is_grad_enabled() or self.length + tokens > self.keys.shape[2]:
            return False
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch forbids writing into such a buffer
        return int(self.used) == self.length


def _last(keys: Tensor, values: Tensor, keep: int | None) -> tuple[Tensor, Tensor]:
    """Copies of the last `keep` slots, or the tensors themselves where there are not more."""
    size = keys.shape[2]
    if keep is None or size <= keep:
        return keys, values
    return keys[:, :, size - keep :].clone(), values[:, :, size - keep :].clone()


def _roomy(t: Tensor) -> Tensor:
    """A copy of `t [B, H, S, d]` in a buffer of twice the length."""
    batch, heads, size, width = t.shape
    buffer = t.new_empty(batch, heads, 2 * size, width)
    buffer[:, :, :size] = t
    return buffer


class Attention(nn.Module):
    """Causal self-attention without biases, with rotary positions (Su et al. 2021).

    Args:
        dim: model width D.
        num_heads: heads H; D / H must be an even integer.
        rope_base: base of the rotary frequencies.
        window: tokens each token sees, itself included; None = all that came before.
        around: convolution and activation of keys, values and queries, and a gate σ(W_gate x) on the answers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rope_base: float = 10_000.0,
        window: int | None = None,
        around: Around = PLAIN,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(f"Attention num_heads must divide dim / 2 = {dim / 2:g}, got {num_heads}")
        if window is not None and window < 1:
            raise ValueError(f"Attention window must be at least 1 or None, got {window}")
        self.num_heads = num_heads
        self.rope_base = rope_base
        self.window = window
        self.around = around
        self.conv = CausalConv(3 * dim, around.conv_window) if around.conv_window > 1 else None
        self.gate = make_gate(dim, around)
        self.w_qkv = nn.Linear(dim, 3 * dim, bias=False)  # rows: q, k, v, heads side by side in each
        self.w_out = nn.Linear(dim, dim, bias=False)

    def init_state(self, batch: int) -> KVCache:
        """State at the start of a context: an empty cache."""
        empty = self.w_out.weight.new_empty(
            batch, self.num_heads, 0, self.w_out.in_features // self.num_heads
        )
        cache = KVCache.of(empty, empty, 0, None if self.window is None else self.window - 1)
        return cache if self.conv is None else replace(cache, conv=self.conv.init_state(batch))

    def forward(
        self, x: Tensor, state: KVCache | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, KVCache]:
        """`x [B, T, D]` to `(y [B, T, D], state)`; any split of a sequence gives the same outputs.

        Tokens of different `documents` do not see each other (without `state` only).
        """
        check_input(x, self.w_out.in_features, "Attention")
        check_documents(documents, x, state, "Attention")
        batch, tokens, dim = x.shape
        if state is not None:
            self._check_state(state, x)
        position = 0 if state is None else state.position
        projected, conv = self._project(x, state, documents)
        qkv = projected.view(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], position, self.rope_base)  # [B, H, T, d] each
        v = qkv[2]
        if state is None or not state.position:
            keep = None if self.window is None else self.window - 1
            keys, values, state = k, v, KVCache.of(*_last(k, v, keep), tokens, keep)
        else:
            if state.keys.dtype != k.dtype and not torch.is_autocast_enabled(x.device.type):
                raise ValueError(f"Attention state must be {k.dtype}, got {state.keys.dtype}")
            keys, values, state = state.append(k, v)
        y = attend(q, keys, values, self.window, None if documents is None else documents.runs)
        y = y.transpose(1, 2).reshape(batch, tokens, dim)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x))
        return self.w_out(y), state if conv is None else replace(state, conv=conv)

    def _project(
        self, x: Tensor, state: KVCache | None, documents: Documents | None
    ) -> tuple[Tensor, ConvState | None]:
        """Queries, keys and values side by side `[B, T, 3 D]`, and the state of the convolution."""
        projected, conv = self.w_qkv(x), None
        if self.conv is not None:
            before = None if state is None else state.conv
            projected, conv = self.conv(projected, before, documents)
        return activate(projected, self.around), conv

    def _check_state(self, state: KVCache, x: Tensor) -> None:
        check_kind(state, KVCache, "Attention")
        width = self.w_out.in_features // self.num_heads
        for held in (state.keys, state.values):
            check_held(held, (self.num_heads, *held.shape[2:3], width), x, "Attention")
        window = None if state.keep is None else state.keep + 1
        if window != self.window:
            raise ValueError(f"Attention state must be of window {self.window}, got one of {window}")
        if (state.conv is None) != (self.conv is None):
            has = "without" if self.conv is None else "with"
            raise ValueError(f"Attention state must be {has} a convolution")


def rotate(x: Tensor, position: int, base: float) -> Tensor:
    """Rotary embedding of `x [..., T, d]`, whose first token stands at `position`.

    Coordinates i and i + d/2 turn together by the angle position · base^(−2i/d). Angles are float32 at least.
    """
    tokens, width = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(position, position + tokens, device=x.device, dtype=wide)
    powers = torch.arange(0, width, 2, device=x.device, dtype=wide) / width
    angles = torch.outer(steps, base**-powers)  # [T, d / 2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, window: int | None = None, runs: Tensor | None = None
) -> Tensor:
    """Softmax attention of the last T of S tokens over those up to themselves, at most `window` of them.

    Args:
        q: `[B, H, T, d]`, queries of the last T tokens.
        keys, values: `[B, H, S, d]`.
        window: tokens seen, the token itself included; None = all.
        runs: number of every token's document in its row `[B, T]`, for T = S; a token sees only those of its
            own. None = all are one.

    Returns:
        `[B, H, T, d]`.
    """
    tokens = q.shape[2]
    past = keys.shape[2] - tokens
    if window is not None and tokens > window:
        return _attend_in_blocks(q, keys, values, window, runs)
    if window is not None and past >= window:
        raise ValueError(f"attend takes at most window - 1 = {window - 1} past keys, got {past}")
    if runs is not None:
        same = runs[:, None, :, None] == runs[:, None, None, :]  # [B, 1, T, T]
        mask = same & _band(tokens, past, window, q.device)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    if past == 0 or tokens == 1:  # one token sees all the keys it is given
        return F.scaled_dot_product_attention(q, keys, values, is_causal=tokens > 1)
    mask = _band(tokens, past, window, q.device)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def _band(tokens: int, past: int, window: int | None, device: torch.device) -> Tensor:
    """`[T, past + T]`: whether query r, at position past + r, sees key j."""
    mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)
    return mask if window is None else mask.triu(past - window + 1)


def _attend_in_blocks(
    q: Tensor, keys: Tensor, values: Tensor, window: int, runs: Tensor | None = None
) -> Tensor:
    """Sliding-window attention in O(T · window): blocks of W queries see their own block and the one before.

    Needs at most W - 1 past keys. The first block gets W - past empty slots in front, which are masked.
    """
    batch, heads, tokens, width = q.shape
    past = keys.shape[2] - tokens
    blocks = -(-tokens // window)
    front, back = window - past, blocks * window - tokens
    q = F.pad(q, (0, 0, 0, back)).reshape(batch * heads, blocks, window, width)
    keys, values = (
        F.pad(t, (0, 0, front, back)).flatten(0, 1).unfold(1, 2 * window, window).transpose(2, 3)
        for t in (keys, values)
    )  # [B·H, blocks, 2W, d]
    mask = _band(window, window, window, q.device).repeat(blocks, 1, 1)  # [blocks, W, 2W]
    mask[0, :, :front] = False
    mask = mask[None]
    if runs is not None:
        theirs = F.pad(runs, (front, back), value=-1).unfold(1, 2 * window, window)  # [B, blocks, 2W]
        mask = mask & (theirs[..., window:, None] == theirs[..., None, :])
        mask = mask.repeat_interleave(heads, 0)  # [B·H, blocks, W, 2W]
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return y.reshape(batch, heads, blocks * window, width)[:, :, :tokens]
