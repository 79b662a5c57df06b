"""Self-modifying Titans over a sequence of whole chunks, as one function with a backward pass of its own.

The loop over chunks lives outside of any graph, so that one compiled function per direction serves all
chunks, and what the backward pass keeps is decided here: the inputs, and either the few products that are
dear to compute again (`ChunkKept`) or, with `every`, only the memories at the start of every so many chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nested_learning.ops.memory_mlp.stack import Outputs, Stack
from nested_learning.ops.memory_mlp.write import Kept
from nested_learning.ops.self_modifying.chunk import (
    ChunkKept,
    Inputs,
    Plan,
    chunk_again_backward,
    chunk_backward,
    chunk_forward,
)
from nested_learning.ops.shifted_sum import UnitStreams, unit_streams, unit_streams_backward


@dataclass
class _Kernels:
    """The functions of a scan, as they run: eager, or compiled."""

    forward: Callable[..., Any] = chunk_forward
    backward: Callable[..., Any] = chunk_backward
    again: Callable[..., Any] = chunk_again_backward
    streams: Callable[..., UnitStreams] = unit_streams
    streams_backward: Callable[..., Any] = unit_streams_backward


kernels = _Kernels()


def compile_chunks() -> None:
    """Run all chunks of this process through `torch.compile`: one graph each way, one per set of shapes."""
    compiled = partial(torch.compile, dynamic=False, fullgraph=True)
    kernels.forward, kernels.backward = compiled(chunk_forward), compiled(chunk_backward)
    kernels.again = compiled(chunk_again_backward)
    kernels.streams, kernels.streams_backward = compiled(unit_streams), compiled(unit_streams_backward)


def _flatten(kept: ChunkKept) -> list[Tensor | None]:
    errors, solved2, inverses = kept.write
    return [kept.k, kept.v, kept.q, *kept.rest, *errors, solved2, inverses]


def _unflatten(tensors: Sequence[Tensor]) -> ChunkKept:
    k, v, q, *rest = tensors
    full, rate, solved2, inverses = rest[-4:]
    return ChunkKept(k, v, q, tuple(rest[:-4]), Kept(Outputs(full, rate), solved2, inverses))


KEPT = 3 + 4 + 4  # tensors of a ChunkKept


def _chunks(x: Inputs, chunk: int) -> list[Inputs]:
    k, v, q = (torch.split(t, chunk, 1) for t in x[:3])
    return [Inputs(*four) for four in zip(k, v, q, torch.split(x.rates, chunk, 2), strict=True)]


def _inputs(streams: Tensor, rates: Tensor) -> Inputs:
    """Views of keys, values and queries `[3, N, T, d]`, and the rates."""
    k, v, q = streams.unbind(0)
    return Inputs(k, v, q, rates)


class Stream(NamedTuple):
    """What a run of tokens gives the scan."""

    padded: Tensor  # [B, W - 1 + T, 3·D] projections of the input, before their convolution
    conv: Tensor  # [3·D, W] its taps
    rates: Tensor  # [2, N, T] slow logits of η and α


@dataclass(frozen=True)
class Setting:
    """How a scan runs; see `scan`."""

    plan: Plan
    heads: int
    chunk: int
    every: int | None


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Setting, *tensors: Tensor) -> tuple[Tensor, ...]:
        stream, w = Stream(*tensors[:3]), Stack(*tensors[3:])
        x = _inputs(kernels.streams(stream.padded, stream.conv, how.heads).x, stream.rates)
        answers = torch.empty_like(x.q)
        saved: list[Tensor | None] = []
        for i, part in enumerate(_chunks(x, how.chunk)):
            if how.every is None or i % how.every == 0:
                saved += w
            answer, w, kept = kernels.forward(w, part, how.plan)
            answers[:, i * how.chunk : (i + 1) * how.chunk] = answer
            if how.every is None:
                saved += _flatten(kept)
        ctx.how = how
        ctx.save_for_backward(*stream, *saved)
        return answers, *w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_answers: Tensor, *d_weights: Tensor) -> tuple[Any, ...]:
        how: Setting = ctx.how
        tensors = ctx.saved_tensors  # once: activation checkpointing gives them once
        stream, saved = Stream(*tensors[:3]), tensors[3:]
        made = kernels.streams(stream.padded, stream.conv, how.heads)
        parts = _chunks(_inputs(made.x, stream.rates), how.chunk)
        d_x, d_rates = torch.empty_like(made.x), torch.empty_like(stream.rates)
        d_parts = _chunks(_inputs(d_x, d_rates), how.chunk)
        d_answer, d_w = torch.split(d_answers, how.chunk, 1), Stack(*d_weights)
        for i, w, kept in _backwards(parts, saved, how):
            if kept is None:
                d_part, d_w = kernels.again(w, parts[i], d_answer[i], d_w, how.plan)
            else:
                d_part, d_w = kernels.backward(w, parts[i], kept, d_answer[i], d_w, how.plan)
            for whole, new in zip(d_parts[i], d_part, strict=True):
                whole.copy_(new)
        d_padded, d_conv = kernels.streams_backward(stream.padded, stream.conv, made, d_x)
        return None, d_padded, d_conv, d_rates, *d_w


def _backwards(
    parts: list[Inputs], saved: Sequence[Tensor], how: Setting
) -> Iterator[tuple[int, Stack, ChunkKept | None]]:
    """Number, memories at the start and what was kept (None = nothing) of every chunk, last chunk first."""
    every = how.every
    if every is None:
        size = len(Stack._fields) + KEPT
        for i in range(len(parts) - 1, -1, -1):
            mine = saved[i * size : (i + 1) * size]
            yield i, Stack(*mine[:3]), _unflatten(mine[3:])
        return
    for first in range((len(parts) - 1) // every * every, -1, -every):
        w = Stack(*saved[3 * (first // every) : 3 * (first // every) + 3])
        starts = [(first, w)]
        for i in range(first + 1, min(first + every, len(parts))):
            w = kernels.forward(w, parts[i - 1], how.plan)[1]
            starts.append((i, w))
        while starts:
            yield *starts.pop(), None


def scan(stream: Stream, w: Stack, how: Setting) -> tuple[Tensor, Stack]:
    """Answers `[N, T, d]` and the memories after `T` tokens, a multiple of the chunk.

    Args:
        stream: slow projections of the input, and the taps that mix neighbouring tokens.
        w: memories at the start.
        how: what is adaptive, heads, tokens per chunk, and `every`: keep for the backward pass only the
            memories of every so many chunks (None = keep what is dear to compute again).
    """
    answers, *after = _Scan.apply(how, *stream, *w)  # type: ignore[no-untyped-call]
    return answers, Stack(*after)
