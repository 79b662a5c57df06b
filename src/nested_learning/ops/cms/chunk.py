"""One fast level of the Continuum Memory System over some tokens of a chunk, as a function of explicit state.

Shapes: B batch, D model width, n tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.ops.delta_rule.chunk import Prepared
from nested_learning.ops.memory_mlp.chunk import (
    Memories,
    Pass,
    WriteRule,
    WriteTokens,
    finish,
    forward,
    read,
    write,
)


class LevelProgress(NamedTuple):
    """Where the sequences stand: the memory, the tokens of the unfinished chunk (None = none), and the memory
    at the start of a context."""

    memory: Memories
    pending: WriteTokens | None
    start: Memories


class LevelPiece(NamedTuple):
    """Some tokens of one chunk.

    Args:
        queries: inputs of unit norm `[B, n, D]`.
        tokens: what they write.
        ends: what happens after them: a "write", a "reset" to the initial state, or nothing (None).
        ready: what their write needs beside errors, where they are the whole chunk.
    """

    queries: Tensor
    tokens: WriteTokens
    ends: str | None
    ready: Prepared | None = None


def answer_and_write(
    rule: WriteRule, shared: str | None, at: LevelProgress, piece: LevelPiece
) -> tuple[Tensor, LevelProgress]:
    """Answers `[B, n, D]` by the weights of the chunk's start, and where the sequences stand afterwards.

    Args:
        rule: the options of the write.
        shared: what the keys of a piece are: the "same" as its queries, those of the token before ("next":
            the target is the next token's), or None = projected on their own.
        at: where the sequences stand.
        piece: the tokens.
    """
    memory, pending, start = at
    queries, new, ends, ready = piece
    if ends == "write" and ready is not None:
        answer, at_keys = _read_both(memory, queries, ready.keys, shared)
        return answer, LevelProgress(_written(rule, memory, at_keys, new.v, ready), None, start)
    answer = read(memory.weights, queries)[0].squeeze(1)
    if ends == "reset":
        return answer, LevelProgress(start, None, start)
    pending = new if pending is None else pending.join(new)
    if ends is None:
        return answer, LevelProgress(memory, pending, start)
    (at_keys,) = forward(memory.weights, pending.k)
    ready = pending.prepare(rule.delta)
    return answer, LevelProgress(_written(rule, memory, at_keys, pending.v, ready), None, start)


def _read_both(memory: Memories, queries: Tensor, keys: Tensor, shared: str | None) -> tuple[Tensor, Pass]:
    """Answers to the queries, and the forward pass at the keys, in one where they are the same inputs."""
    if shared is None:
        at_queries, at_keys = forward(memory.weights, queries, keys)
        return at_queries.answers[0].squeeze(1), at_keys
    if shared == "same":
        (at,) = forward(memory.weights, queries)
        return at.answers[0].squeeze(1), at
    count = queries.shape[1]
    (at,) = forward(memory.weights, torch.cat([keys[:, :1], queries], 1))
    return at.tokens(1, count + 1).answers[0].squeeze(1), at.tokens(0, count)


def _written(rule: WriteRule, memory: Memories, at: Pass, values: Tensor, ready: Prepared) -> Memories:
    # P = 0: the residual connection is outside the level
    return finish(write(rule, memory, at, (values.unsqueeze(1),), ready), memory)
