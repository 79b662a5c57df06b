"""Reading and writing stacks of two-layer memories, M(x) = P x + W₁ σ̂(W₂ x), over one chunk.

The only implementation: self-modifying Titans, Titans and the fast levels of the Continuum Memory System all
use it, with every option of `WriteRule`, and automatic differentiation goes through it. `README.md` derives
the equations; `naive.py` is the oracle.

All memories of a stack have the same keys, so that their first layers are one linear memory with M·h outputs
(one Gram matrix, one triangular system). Their second layers have keys of their own, σ̂(W₂k).

Shapes: `N` sequences times heads, `M` memories, `C` tokens of the chunk, `d` input width, `h` hidden width,
`o` output width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.checks import one_of, positive, within
from nested_learning.ops.delta_rule.chunk import (
    Applied,
    LinearMemory,
    Prepared,
    Written,
    apply,
    delta_write,
    make_rates,
    prepare,
    read_inside,
)
from nested_learning.ops.delta_rule.chunk import finish as delta_finish
from nested_learning.ops.scan import put_together, take_apart

EPS = 1.0  # in the norm of the hidden layer: keeps the slope of σ̂ below 1.1, so that no error is amplified
CLAMP = 2 * (1 - 1e-6)  # largest η / α: below 2 by more than float32 rounds


def chunk_limit(chunk: int) -> float:
    """Largest step size with which a key that fills a chunk does not overshoot: errors are those of the
    chunk's start, and their steps add up to at most 2."""
    return min(1.0, 2 / chunk)


@dataclass(kw_only=True, slots=True)
class WriteRule:
    """The options of a write.

    Args:
        delta: the delta term, W(αI − ηkkᵀ), on both layers.
        momentum: S_t = β S_{t−1} − η e kᵀ, with a slow, data-dependent β.
        retention: α < 1. Off means α = 1.
        retention_target: what forgetting returns to, "zero" or "init" (the meta-learned initial state).
        eta_max: upper bound of the step size; None = 1 in `self_mod`, `titans` and `linear`, and
            `chunk_limit` in `self_mod_linear` and fast levels.
        step_control: "clamp" bounds η by 2α, so that αI − ηkkᵀ lengthens nothing; it acts only where η may be
            larger, so with `eta_max` of at most 1 only for α < ½. "none": η is what `eta_max` allows.
        error_limit: the gradient at a memory's output is shortened to at most this norm (the objective is
            Huber's: quadratic near the target, then linear); None = it is not (½‖M(k) − v̂‖²).
    """

    delta: bool = True
    momentum: bool = False
    retention: bool = True
    retention_target: str = "zero"
    eta_max: float | None = None
    step_control: str = "clamp"
    error_limit: float | None = None

    def check(self, where: str) -> None:
        """Raise ValueError for a value that is not allowed. `where`: the name of the rule in errors."""
        one_of(f"{where}.retention_target", self.retention_target, ("zero", "init"))
        within(f"{where}.eta_max", self.eta_max, "(0, 2]")
        one_of(f"{where}.step_control", self.step_control, ("clamp", "none"))
        positive(f"{where}.error_limit", self.error_limit)

    @property
    def to_initial(self) -> bool:
        """Whether forgetting returns to the initial state."""
        return self.retention and self.retention_target == "init"

    def step_limit(self, otherwise: float) -> float:
        """Upper bound of the step size; `otherwise`: if none is set."""
        return otherwise if self.eta_max is None else self.eta_max

    def errors(self, differences: Tensor) -> Tensor:
        """Gradients of the objective at the outputs, from M(k) − v̂ `[..., o]`."""
        if self.error_limit is None:
            return differences
        most = self.error_limit**2  # e · min(1, limit / ‖e‖), with a finite gradient at e = 0
        return differences * (most / differences.square().sum(-1, keepdim=True).clamp(min=most)).sqrt()

    def rates(self, logits: Sequence[Tensor], limit: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """η of at most `limit`, log α and log β (None = no momentum) of a write, from their logits."""
        log_alpha = F.logsigmoid(logits[1]) if self.retention else torch.zeros_like(logits[1])
        log_beta = F.logsigmoid(logits[2]) if self.momentum else None
        eta = self.control(limit * torch.sigmoid(logits[0]), log_alpha)
        return eta, log_alpha, log_beta

    def control(self, eta: Tensor, log_alpha: Tensor) -> Tensor:
        """Step sizes as `step_control` has them. With η ≤ 2α and ‖k‖ ≤ 1, ‖αI − ηkkᵀ‖ ≤ α."""
        if self.step_control == "none" or not self.delta:
            return eta
        return torch.minimum(eta, CLAMP * log_alpha.exp())


class Stack(NamedTuple):
    """Weights of M memories of every sequence; also their momenta, or the state that retention pulls to.

    Memories of one output width stand together in `w1`, in the order of `w2`.
    """

    w2: Tensor  # [N, M, h, d] first layers
    w1: tuple[Tensor, ...]  # [N, m, o, h] second layers, one tensor per output width; the m add up to M

    def map(self, fn: Callable[[Tensor], Tensor]) -> Stack:
        """The same stack with `fn` applied to every tensor."""
        return Stack(fn(self.w2), tuple(fn(w) for w in self.w1))

    def select(self, first: int, last: int) -> Stack:
        """The memories from number `first` to before `last`."""
        w1, seen = [], 0
        for group in self.w1:
            size = group.shape[1]
            if first < seen + size and last > seen:
                w1.append(group[:, max(0, first - seen) : last - seen])
            seen += size
        return Stack(self.w2[:, first:last], tuple(w1))


class WriteTokens(NamedTuple):
    """What a write needs of its tokens: `k, v [N, n, d]`, rates `[N, n]` (log β None = no momentum)."""

    k: Tensor
    v: Tensor
    eta: Tensor
    log_alpha: Tensor
    log_beta: Tensor | None = None

    def join(self, more: WriteTokens) -> WriteTokens:
        """These tokens, then `more`."""
        pairs = zip(self, more, strict=True)
        return WriteTokens(*(None if a is None or b is None else torch.cat([a, b], 1) for a, b in pairs))  # type: ignore[arg-type]

    def with_steps(self, factor: float) -> WriteTokens:
        """These tokens with step sizes `factor` times as large."""
        return self if factor == 1 else self._replace(eta=factor * self.eta)

    def last(self, count: int) -> WriteTokens:
        """The last `count` tokens."""
        return WriteTokens(*(None if t is None else t[:, t.shape[1] - count :] for t in self))  # type: ignore[arg-type]

    def split(self, lengths: list[int]) -> list[WriteTokens]:
        """Consecutive runs of tokens. (One split: the gradient of a slice is as long as the sequence.)"""
        pieces = [torch.split(t, lengths, 1) for t in self if t is not None]
        return [WriteTokens(*tensors) for tensors in zip(*pieces, strict=True)]

    def prepare(self, delta: bool) -> Prepared:
        """What a write over all these tokens needs beside errors. `delta`: whether the delta term erases."""
        return prepare(make_rates(self.eta, self.log_alpha, self.log_beta), self.k, delta=delta)

    def prepare_chunks(self, delta: bool, lengths: list[int], size: int) -> list[Prepared | None]:
        """The same for their runs of these lengths that are whole chunks of `size` tokens, all computed at
        once. None for the other runs; they may only be the first and the last."""
        whole = [length == size for length in lengths]
        if not any(whole):
            return [None] * len(lengths)
        tokens = slice(0 if whole[0] else lengths[0], None if whole[-1] else -lengths[-1])
        chunks = (None if t is None else t[:, tokens].reshape(len(t), -1, size, *t.shape[2:]) for t in self)
        tensors: list[Tensor] = []
        frame = take_apart(WriteTokens(*chunks).prepare(delta), tensors)  # type: ignore[arg-type]
        rows = zip(*(t.unbind(1) for t in tensors), strict=True)
        return [put_together(frame, iter(next(rows))) if is_whole else None for is_whole in whole]


class Memories(NamedTuple):
    """Memories that are written together: weights, momenta (None = no momentum), and W_init, which forgetting
    returns to (None = to zero)."""

    weights: Stack
    momentum: Stack | None
    initial: Stack | None


class Hidden(NamedTuple):
    """The hidden layer u = σ̂(z) = s r at z = W₂x, with s = silu(z) and r = (‖s‖² + 1)^(−1/2)."""

    z: Tensor  # [N, M, C, h]
    gate: Tensor  # sigmoid(z)
    s: Tensor
    r: Tensor  # [N, M, C, 1]
    u: Tensor

    def backward(self, g: Tensor) -> Tensor:
        """σ̂'(z)ᵀ g."""
        tangent = self.r * (g - self.u * (self.u * g).sum(-1, keepdim=True))
        return (self.gate + self.s * (1 - self.gate)) * tangent


def hidden(z: Tensor) -> Hidden:
    """σ̂ at `z [..., h]`, an output of at most unit norm: what Eq. 57 assumes of the input of W₁."""
    gate = torch.sigmoid(z)
    s = z * gate
    r = (s.square().sum(-1, keepdim=True) + EPS).rsqrt()
    return Hidden(z, gate, s, r, s * r)


class Pass(NamedTuple):
    """The forward pass of a stack at some inputs."""

    x: Tensor  # [N, C, d] shared by all memories
    hidden: Hidden
    answers: tuple[Tensor, ...]  # W₁u, [N, m, C, o] for every output width

    def tokens(self, first: int, last: int) -> Pass:
        """The inputs from number `first` to before `last`."""
        at = Hidden(*(t[:, :, first:last] for t in self.hidden))
        return Pass(self.x[:, first:last], at, tuple(a[:, :, first:last] for a in self.answers))


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Along dimension 1; a single one is not copied."""
    return torch.cat(list(tensors), 1) if len(tensors) > 1 else tensors[0]


def _second(u: Tensor, w1: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """W₁u for every output width, from `u [N, M, C, h]`."""
    parts = torch.split(u, [w.shape[1] for w in w1], 1)
    return tuple(part @ w.mT for part, w in zip(parts, w1, strict=True))


def forward(weights: Stack, *inputs: Tensor) -> list[Pass]:
    """All memories at inputs `[N, C, d]`, their first layers in one product."""
    sizes = [x.shape[1] for x in inputs]
    z = concatenate(inputs) @ weights.w2.flatten(1, 2).mT
    passes = []
    for x, part in zip(inputs, torch.split(z, sizes, 1), strict=True):
        at = hidden(_to_memories(part, weights.w2.shape[1]))
        passes.append(Pass(x, at, _second(at.u, weights.w1)))
    return passes


def read(weights: Stack, x: Tensor) -> tuple[Tensor, ...]:
    """W₁σ̂(W₂x), `[N, m, C, o]` for every output width; `x [N, C, d]`, or `[N, M, C, d]` for each its own."""
    if x.dim() == 3:
        return forward(weights, x)[0].answers
    return _second(hidden(x @ weights.w2.mT).u, weights.w1)


def _to_memories(rows: Tensor, memories: int) -> Tensor:
    """`[N, C, M·h]` → `[N, M, C, h]`."""
    return rows.view(*rows.shape[:2], memories, -1).transpose(1, 2)


def _to_rows(z: Tensor) -> Tensor:
    """`[N, M, C, h]` → `[N, C, M·h]`."""
    return z.transpose(1, 2).flatten(2)


class StackWritten(NamedTuple):
    """The write of a stack over a chunk."""

    first: Written  # of the first layers, as one memory with M·h outputs
    second: tuple[Written, ...]  # of the second layers, for every output width

    def of_first_memory(self) -> StackWritten:
        """The write of memory number 0 alone."""
        rates, keys, *parts = self.second[0]
        second = Written(rates, keys[:, :1], *(None if t is None else t[:, :1] for t in parts))
        width = keys.shape[-1]
        rates, keys, *parts = self.first
        first = Written(rates, keys, *(None if t is None else t[..., :width] for t in parts))
        return StackWritten(first, (second,))


def write(
    rule: WriteRule, memories: Memories, at: Pass, targets: tuple[Tensor, ...], ready: Prepared
) -> StackWritten:
    """Solve for the write of one chunk, which takes every memory M(k) towards its v̂.

    Args:
        rule: the options.
        memories: at the chunk's start.
        at: their forward pass at the keys, which have unit norm.
        targets: v̂ − P k of every memory, `[N, m, C, o]` for every output width.
        ready: what is known of the write before: keys, rates, the triangular system of the first layers.
    """
    w1 = memories.weights.w1
    errors = tuple(rule.errors(a - t) for a, t in zip(at.answers, targets, strict=True))
    at_hidden = concatenate([e @ w for e, w in zip(errors, w1, strict=True)])  # W₁ᵀe
    error = _to_rows(at.hidden.backward(at_hidden))
    _, momentum, initial = _first_layers(memories)
    start = Applied(_to_rows(at.hidden.z), *apply(at.x, momentum, initial))
    first = delta_write(ready, error, start)
    wide, second = ready.rates.map_over_memories(), []
    for i, u in enumerate(torch.split(at.hidden.u, [w.shape[1] for w in w1], 1)):
        _, momentum, initial = _second_layers(memories, i)
        start = Applied(at.answers[i], *apply(u, momentum, initial))
        second.append(delta_write(prepare(wide, u, delta=rule.delta), errors[i], start))
    return StackWritten(first, tuple(second))


def _first_layers(memories: Memories) -> LinearMemory:
    """The first layers of all memories as one linear memory `[N, M·h, d]`."""
    return LinearMemory(*(None if stack is None else stack.w2.flatten(1, 2) for stack in memories))  # type: ignore[arg-type]


def _second_layers(memories: Memories, group: int) -> LinearMemory:
    """The second layers of the memories of one output width, as linear memories `[N, m, o, h]`."""
    return LinearMemory(*(None if stack is None else stack.w1[group] for stack in memories))  # type: ignore[arg-type]


def finish(written: StackWritten, memories: Memories) -> Memories:
    """The memories after the chunk."""
    weights, _, initial = memories
    w2, s2 = delta_finish(written.first, *_first_layers(memories))
    pairs = [delta_finish(w, *_second_layers(memories, i)) for i, w in enumerate(written.second)]
    shape = weights.w2.shape
    after = Stack(w2.view(shape), tuple(w1 for w1, _ in pairs))
    if s2 is None:
        return Memories(after, None, initial)
    return Memories(after, Stack(s2.view(shape), tuple(s1 for _, s1 in pairs if s1 is not None)), initial)


def answer_inside(written: StackWritten, memories: Memories, x: Tensor, read: str) -> tuple[Tensor, ...]:
    """W₁σ̂(W₂x) inside the chunk, before or after each token's own write; `x [N, Q, d]`: the last Q tokens."""
    z = read_inside(written.first, x, Applied(*apply(x, *_first_layers(memories))), read)
    w1 = memories.weights.w1
    u = hidden(_to_memories(z, memories.weights.w2.shape[1])).u
    answers = []
    for i, part in enumerate(torch.split(u, [w.shape[1] for w in w1], 1)):
        start = Applied(*apply(part, *_second_layers(memories, i)))
        answers.append(read_inside(written.second[i], part, start, read))
    return tuple(answers)
