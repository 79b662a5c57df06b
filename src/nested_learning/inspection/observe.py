"""Reads the input of one layer again, chunk by chunk, and looks at each of its memories.

What a memory holds comes from the states that the layer itself hands back. What it was written with (keys,
errors, rates, the solved system) is computed by the functions that the layer calls.

Shapes: H heads of one sequence, n tokens of a chunk, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nested_learning.inspection.measures import RankOne, outer_products, stack_products
from nested_learning.layers.cms import FastLevel
from nested_learning.layers.linear import GatedDeltaRule
from nested_learning.layers.self_modifying import SelfModifyingTitans
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear
from nested_learning.ops.cms.chunk import LevelProgress
from nested_learning.ops.delta_rule.chunk import (
    Applied,
    LinearMemory,
    LinearPiece,
    apply,
    delta_write,
    make_rates,
    prepare,
)
from nested_learning.ops.memory_mlp.chunk import (
    Memories,
    Pass,
    Stack,
    WriteRule,
    WriteTokens,
    forward,
    write,
)
from nested_learning.ops.self_modifying.chunk import Bank, aims, project
from nested_learning.ops.self_modifying_linear import chunk as linear_chunk
from nested_learning.ops.unit import l2_normalize

Matrices = Mapping[str, Tensor]
"""The matrices of a memory by name, each `[H, o, i]`."""
TINY = 1e-30


class Seen(NamedTuple):
    """A memory and the tokens since its last write.

    Args:
        name: of the memory.
        surprise, eta, alpha: of the tokens `[H, n]`.
        before: the memory that they met.
        products: what each has added to every matrix at the end of the chunk; None = not written yet.
        after: the memory after the write; None = not written yet.
        reset: the memory went back to its initial state instead.
    """

    name: str
    surprise: Tensor
    eta: Tensor
    alpha: Tensor
    before: Matrices
    products: Mapping[str, RankOne] | None
    after: Matrices | None
    reset: bool = False


def observe(layer: nn.Module, x: Tensor) -> Iterator[Seen]:
    """Every memory of `layer` at each of its writes, in order, and at last those with an unfinished chunk.

    Args:
        x: the layer's input `[1, T, D]` from the start of a context.

    Raises:
        TypeError: a layer without memories.
    """
    for kind, watch in WATCHES.items():
        if isinstance(layer, kind):
            return watch(layer, x)
    raise TypeError(f"{type(layer).__name__} has no memories that are known here")


def watch_self_modifying(layer: SelfModifyingTitans, x: Tensor) -> Iterator[Seen]:
    """The memories of self-modifying Titans, or of Titans."""
    state = layer.init_state(1)
    waiting: dict[Bank, WriteTokens] = {}
    parts = torch.split(x, min(bank.chunk for bank in layer.layout), 1)
    for number, part in enumerate(parts):
        banks = layer.unpack(state).banks
        streams, _ = layer.streams(part, state.conv)
        _, new = project(layer.config, layer.layout, banks, streams)
        _, state = layer(part, state)
        for bank, before, after in zip(layer.layout, banks, layer.unpack(state).banks, strict=True):
            tokens = waiting.pop(bank).join(new) if bank in waiting else new
            ends = tokens.k.shape[1] == bank.chunk
            if ends or number == len(parts) - 1:
                stepped = tokens.with_steps(bank.steps)
                at, targets = aims(layer.config, bank, before.weights, stepped)
                yield from stack_seen(
                    layer.config, bank.names, before, stepped, at, targets, after.weights if ends else None
                )
            if not ends:
                waiting[bank] = tokens


def stack_seen(
    rule: WriteRule,
    names: tuple[str, ...],
    memories: Memories,
    tokens: WriteTokens,
    at: Pass,
    targets: tuple[Tensor, ...],
    after: Stack | None,
) -> Iterator[Seen]:
    """The memories of a stack over some tokens. `at`, `targets`: as `memory_mlp.write` takes them."""
    pairs = zip(at.answers, targets, strict=True)
    norms = torch.cat([rule.errors(a - t).norm(dim=-1) for a, t in pairs], 1)  # [H, M, n]
    products = None
    if after is not None:
        products = stack_products(write(rule, memories, at, targets, tokens.prepare(rule.delta)))
    for m, name in enumerate(names):
        yield Seen(
            name,
            norms[:, m],
            tokens.eta,
            tokens.log_alpha.exp(),
            matrices_of(memories.weights, m),
            None if products is None else products[m],
            None if after is None else matrices_of(after, m),
        )


def matrices_of(weights: Stack, number: int) -> Matrices:
    """W2 and W1 of one memory of a stack."""
    one = weights.select(number, number + 1)
    return {"W2": one.w2[:, 0], "W1": one.w1[0][:, 0]}


def watch_fast_level(level: FastLevel, x: Tensor) -> Iterator[Seen]:
    """The memory of a fast level."""
    state = level.init_state(1)
    for part in torch.split(x, level.chunk_size, 1):
        before, resets = level.unpack(state), state.resets
        queries = l2_normalize(part.to(torch.promote_types(part.dtype, torch.float32)))
        tokens, _ = level.tokens(part, queries, state.last)
        _, state = level(part, state)
        after = level.unpack(state) if part.shape[1] == level.chunk_size else None
        yield level_seen(level, before, tokens, after, state.resets > resets)


def level_seen(
    level: FastLevel, before: LevelProgress, tokens: WriteTokens, after: LevelProgress | None, reset: bool
) -> Seen:
    """The memory of a fast level over the tokens of a chunk."""
    memory, name = before.memory, f"level:{level.spec.name}"
    (at,) = forward(memory.weights, tokens.k)
    now = None if after is None else after.memory.weights
    targets = (tokens.v.unsqueeze(1),)
    (seen,) = stack_seen(level.config, (name,), memory, tokens, at, targets, now)
    if reset and seen.products is not None:  # what the tokens would have written is dropped
        nothing = {name: RankOne(0 * p.left, p.keys) for name, p in seen.products.items()}
        return seen._replace(products=nothing, reset=True)
    return seen


def watch_linear(layer: GatedDeltaRule, x: Tensor) -> Iterator[Seen]:
    """The matrix of a gated delta rule. Its chunks only say when we look: every token is written at once."""
    state = layer.init_state(1)
    for part in torch.split(x, layer.chunk_size, 1):
        momentum = None if state.momentum is None else state.momentum[0]
        tokens, _ = layer.tokens(part, state.conv)
        at = LinearMemory(state.weights[0], momentum)
        _, state = layer(part, state)
        yield linear_seen(layer.config, at, tokens, state.weights[0])


def linear_seen(rule: WriteRule, at: LinearMemory, tokens: LinearPiece, after: Tensor) -> Seen:
    """A matrix with dot-product objective over some tokens.

    The surprise is W k − v at the weights before the token with the delta term, and −v without.
    """
    start = Applied(*apply(tokens.k, *at))
    rates = make_rates(tokens.eta, tokens.log_alpha, tokens.log_beta)
    written = delta_write(prepare(rates, tokens.k, delta=rule.delta), -tokens.v, start)
    parts = [part for part in (written.solved, written.error) if part is not None]
    steps = torch.stack(parts).sum(0)  # η (W k − v)
    surprise = steps.norm(dim=-1) / tokens.eta.clamp(min=TINY)
    products = {"W": outer_products(written)}
    before = {"W": at.weights}
    return Seen("linear", surprise, tokens.eta, tokens.log_alpha.exp(), before, products, {"W": after})


def watch_linear_memories(layer: SelfModifyingLinear, x: Tensor) -> Iterator[Seen]:
    """The matrices of self-modifying Titans with linear memories: initial weights times the gain Γ."""
    state = layer.init_state(1)
    prefix = "initial_"
    initial = {name.removeprefix(prefix): weights for name, weights in layer.memories.items()}
    for part in torch.split(x, layer.chunk_size, 1):
        at = layer.unpack(state)
        streams, _ = layer.streams(part, state.conv)
        _, tokens = linear_chunk.project(layer.config, layer.chunk_size, at, streams)
        _, state = layer(part, state)
        ends = part.shape[1] == layer.chunk_size
        after = layer.unpack(state).gain.weights if ends else None
        written, _ = linear_chunk.write(layer.config, at.gain, tokens, tokens.k[:, :0])
        left, keys = outer_products(written)
        difference = (tokens.k - tokens.v) @ at.gain.weights.mT
        for name, start in initial.items():
            weights = start.detach().to(left.dtype)
            yield Seen(
                name,
                (difference @ weights.mT).norm(dim=-1),
                tokens.eta,
                tokens.log_alpha.exp(),
                {"W": weights @ at.gain.weights},
                {"W": RankOne(left @ weights.mT, keys)} if ends else None,
                None if after is None else {"W": weights @ after},
            )


WATCHES: dict[type[nn.Module], Callable[..., Iterator[Seen]]] = {
    SelfModifyingTitans: watch_self_modifying,
    SelfModifyingLinear: watch_linear_memories,
    GatedDeltaRule: watch_linear,
    FastLevel: watch_fast_level,
}
