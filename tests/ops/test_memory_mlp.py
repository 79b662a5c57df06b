"""The write of stacks of memories against the token loop: answers, state, every gradient, in float64."""

from __future__ import annotations

import pytest
import torch
from test_memory_ops import CHUNKS, READS, SWITCHES, assert_same_with_gradients, randn, rates, unit
from tolerances import assert_same
from torch import Tensor

from nested_learning.ops.memory_mlp import naive
from nested_learning.ops.memory_mlp.chunk import (
    Memories,
    Stack,
    WriteRule,
    WriteTokens,
    answer_inside,
    finish,
    forward,
    read,
    write,
)

Outputs = tuple[Tensor, ...]


def in_chunks(
    rule: WriteRule,
    memories: Memories,
    q: Tensor,
    tokens: WriteTokens,
    targets: Outputs,
    size: int,
    which: str,
) -> tuple[Outputs, Memories]:
    """Answers q + W₁σ̂(W₂q) (P = 1 for every memory) and the memories after the last token."""
    answers: list[Outputs] = []
    pieces = [torch.split(t, size, 1) for t in (q, *(t for t in tokens if t is not None))]
    wanted = [torch.split(t, size, 2) for t in targets]
    for number, (queries, *own) in enumerate(zip(*pieces, strict=True)):
        chunk = WriteTokens(*own)
        (at,) = forward(memories.weights, chunk.k)
        targets = tuple(v[number] - chunk.k[:, None] for v in wanted)
        written = write(rule, memories, at, targets, chunk.prepare(rule.delta))
        if which == "chunk":
            found = read(memories.weights, queries)
        else:
            found = answer_inside(written, memories, queries, which)
        answers.append(tuple(queries[:, None] + a for a in found))
        memories = finish(written, memories)
    return tuple(torch.cat(parts, 2) for parts in zip(*answers, strict=True)), memories


def stack(n: int, d: int, h: int, m: int) -> Stack:
    return Stack(randn(n, m, h, d), (randn(n, m, d, h),))


@pytest.mark.parametrize(("delta", "momentum", "retention"), SWITCHES)
@pytest.mark.parametrize("which", READS)
@pytest.mark.parametrize("size", CHUNKS)
def test_memories_equal_the_token_loop(
    size: int, which: str, delta: bool, momentum: bool, retention: bool
) -> None:
    torch.manual_seed(0)
    n, steps, d, h, m = 3, 15, 4, 5, 2
    q, k, targets = randn(n, steps, d), unit(n, steps, d), randn(n, m, steps, d)
    eta, alpha, beta = rates((n,), steps, momentum, retention)
    weights = stack(n, d, h, m)
    moments, initial = stack(n, d, h, m) if momentum else None, stack(n, d, h, m) if retention else None
    tokens = WriteTokens(k, k, eta, alpha.log(), None if beta is None else beta.log())
    rule = WriteRule(delta=delta, momentum=momentum)
    (answers,), after = in_chunks(
        rule, Memories(weights, moments, initial), q, tokens, (targets,), size, which
    )
    ours = [answers, after.weights.w1[0], after.weights.w2]
    if after.momentum is not None:
        ours += [after.momentum.w1[0], after.momentum.w2]

    def of(stack: Stack | None, i: int) -> tuple[Tensor, Tensor] | None:
        return None if stack is None else (stack.w1[0][:, i], stack.w2[:, i])

    alone = []
    for i in range(m):
        y, w, s = naive.memory_mlp(
            q, k, targets[:, i], (eta, alpha, beta), of(weights, i),
            chunk_size=size, momentum=of(moments, i), read=which, delta=delta, initial=of(initial, i),
        )  # fmt: skip
        alone.append([y, *w, *(s if momentum else ())])
    theirs = [torch.stack(parts, 1) for parts in zip(*alone, strict=True)]
    stacks = [s for s in (weights, moments, initial) if s is not None]
    inputs = [t for t in (q, k, targets, eta, alpha, beta) if t is not None]
    inputs += [t for s in stacks for t in (s.w2, *s.w1)]
    assert_same_with_gradients(ours, theirs, inputs, length=steps * h)


def test_output_widths_stand_beside_one_another() -> None:
    """Two memories of width 3 and one of width 1 in one stack: each as it is alone."""
    torch.manual_seed(0)
    n, steps, d, h = 2, 7, 3, 4
    k = unit(n, steps, d)
    eta, alpha, _ = rates((n,), steps, False, True)
    tokens = WriteTokens(k, k, eta, alpha.log())
    w2, wide, narrow = randn(n, 3, h, d), randn(n, 2, d, h), randn(n, 1, 1, h)
    targets = randn(n, 2, steps, d), randn(n, 1, steps, 1)

    def after(weights: Stack, targets: Outputs) -> Stack:
        memories = Memories(weights, None, None)
        (at,) = forward(weights, k)
        return finish(write(WriteRule(), memories, at, targets, tokens.prepare(True)), memories).weights

    together = after(Stack(w2, (wide, narrow)), targets)
    for i, group, place in ((0, 0, 0), (1, 0, 1), (2, 1, 0)):
        part, own = (wide, narrow)[group][:, place : place + 1], targets[group][:, place : place + 1]
        alone = after(Stack(w2[:, i : i + 1], (part,)), (own,))
        assert_same(together.w2[:, i : i + 1], alone.w2, length=steps * h)
        assert_same(together.w1[group][:, place : place + 1], alone.w1[0], length=steps * h)


@pytest.mark.parametrize("pattern", [(0,), (0, 1)])
def test_ten_thousand_repeats_stay_bounded(pattern: tuple[int, ...]) -> None:
    """The same token, or two in turn, with the largest step of all and no forgetting."""
    torch.manual_seed(0)
    keys, values = unit(2, 8).detach(), unit(2, 8).detach()
    index = torch.tensor(pattern).repeat(10_000 // len(pattern))
    k, v = keys[index][None].float(), values[index][None, None].float()
    memories = Memories(Stack(torch.randn(1, 1, 8, 8), (torch.randn(1, 1, 8, 8) * 0.1,)), None, None)
    ones = torch.ones(1, len(index))
    with torch.no_grad():
        (y,), after = in_chunks(
            WriteRule(), memories, k, WriteTokens(k, k, ones, ones.log()), (v,), 16, "after_write"
        )
    assert y.isfinite().all() and y.abs().max() < 10
    assert all(w.isfinite().all() and w.norm() < 50 for w in (after.weights.w2, *after.weights.w1))


def test_gradient_of_the_write_by_finite_differences() -> None:
    torch.manual_seed(0)
    k, v = unit(2, 3, 3), randn(2, 1, 3, 3)
    eta, alpha, beta = rates((2,), 3, True, True)

    def weights(k: Tensor, v: Tensor, eta: Tensor, alpha: Tensor, beta: Tensor, *w: Tensor) -> Outputs:
        stacks = [Stack(a, (b,)) for a, b in zip(w[::2], w[1::2], strict=True)]
        memories = Memories(*stacks)
        written = write(
            WriteRule(momentum=True),
            memories,
            forward(stacks[0], k)[0],
            (v,),
            WriteTokens(k, k, eta, alpha.log(), beta.log()).prepare(True),
        )
        after = finish(written, memories)
        return after.weights.w2, *after.weights.w1, after.momentum.w2, *after.momentum.w1

    parts = [t for _ in range(3) for t in (randn(2, 1, 2, 3), randn(2, 1, 3, 2))]
    given = [t.detach().requires_grad_() for t in (k, v, eta, alpha, beta, *parts)]
    assert torch.autograd.gradcheck(weights, given, atol=1e-6)
    assert torch.autograd.gradgradcheck(weights, given, atol=1e-5)
