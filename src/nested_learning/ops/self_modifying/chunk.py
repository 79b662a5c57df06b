"""Self-modifying Titans (Eqs. 86–90) over a run of tokens, as one function of explicit state.

    k = l2(x_k + M_k(x_k)),  v = x_v + M_v(x_v),  q = l2(x_q [+ M_q(x_q)])
    η = limit · sigmoid(r_η + M_η(x_k)),  α = sigmoid(r_α + M_α(x_k)),  β = sigmoid(r_β)
    y = q + M(q),  v̂_□ = P v + M_□(v),  every memory is written with keys k and targets v̂_□

where M_□(x) = W₁σ̂(W₂x) and P = 1, but P = 0 for the rates. All reads are those of the weights at the start of
the memory's chunk (Eq. 90); only M may also be read inside its chunk (`read`). M and the projections may have
different chunk sizes, one a multiple of the other, and step sizes that differ by a factor.

Shapes: `N` sequences times heads, `T` tokens, `d` width of a head, `G` slow rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.checks import within
from nested_learning.ops.memory_mlp.chunk import (
    Memories,
    Pass,
    Stack,
    StackWritten,
    WriteRule,
    WriteTokens,
    answer_inside,
    chunk_limit,
    concatenate,
    finish,
    forward,
    read,
    write,
)
from nested_learning.ops.scan import Runner, run_eager
from nested_learning.ops.segments import segments
from nested_learning.ops.unit import l2_normalize

MEMORY = "memory"
ETA_MAX = 1.0  # of M, if none is set
RATES = ("eta", "alpha")  # memories of output width 1 with P = 0: their P x is a slow projection


@dataclass(kw_only=True, slots=True)
class SelfModRule(WriteRule):
    """What of a self-modifying layer is adaptive, and towards what it is written.

    Args:
        adaptive: which projections are memories that rewrite themselves (`self_mod`, `self_mod_linear`), of
            k, v, q, eta, alpha. The others are slow. The paper's text keeps q slow.
        self_targets: memories learn targets of their own making, v̂ = P v + M(v), instead of v.
        stop_gradient_targets: no outer gradient through the targets.
        injection_cap: a write of `self_mod_linear` adds less than retention takes away, so that its memories
            never grow. Its price: with long retention hardly anything can be written.
        projection_eta_max: upper bound of the step size of adaptive projections (`self_mod` only): their η is
            that of M, smaller by one factor. None = `chunk_limit`. What a projection learns changes all later
            writes, so large steps that do M good make gradients through many chunks explode.
    """

    adaptive: tuple[str, ...] = ("k", "v", "eta", "alpha")
    self_targets: bool = True
    stop_gradient_targets: bool = False
    injection_cap: bool = False
    projection_eta_max: float | None = None

    def check(self, where: str) -> None:
        """Raise ValueError for a value that is not allowed. `where`: the name of the rule in errors."""
        WriteRule.check(self, where)
        within(f"{where}.projection_eta_max", self.projection_eta_max, "(0, 2]")

    def projection_steps(self, chunk: int) -> float:
        """η of projections that are written every `chunk` tokens over that of M."""
        limit = chunk_limit(chunk) if self.projection_eta_max is None else self.projection_eta_max
        return min(1.0, limit / self.step_limit(ETA_MAX))


class Bank(NamedTuple):
    """The memories that are written together, every `chunk` tokens: `names`, those of full width first. Their
    step size is η times `steps`."""

    names: tuple[str, ...]
    chunk: int
    steps: float = 1.0

    @property
    def full(self) -> int:
        """How many are of full width; "memory", if it is here, is the first of them."""
        return sum(name not in RATES for name in self.names)

    @property
    def first_projection(self) -> int:
        """Number of the first memory that projects the input."""
        return int(self.names[0] == MEMORY)


class Streams(NamedTuple):
    """Slow projections of the input: unit `k, v, q [N, T, d]`, and the slow logits `rates [G, N, T]`."""

    k: Tensor
    v: Tensor
    q: Tensor
    rates: Tensor

    def split(self, lengths: list[int]) -> list[Streams]:
        """Consecutive runs of tokens. (One split: the gradient of a slice is as long as the sequence.)"""
        k, v, q = (torch.split(t, lengths, 1) for t in self[:3])
        return [Streams(*four) for four in zip(k, v, q, torch.split(self.rates, lengths, 2), strict=True)]


class SelfModProgress(NamedTuple):
    """Where sequences stand: the memories of every bank, the tokens of the unfinished chunk of the slowest
    bank (None = none), and how many they are."""

    banks: tuple[Memories, ...]
    pending: WriteTokens | None
    position: int


def read_and_write(
    rule: SelfModRule,
    layout: tuple[Bank, ...],
    which: str,
    run: Runner,
    at: SelfModProgress,
    x: Streams,
) -> tuple[Tensor, SelfModProgress]:
    """Answers `[N, T, d]` to a run of tokens, and where the sequences stand after it.

    Args:
        rule: the options.
        layout: which memories there are; the bank of M comes first.
        which: weights that M is read with: "chunk", "before_write" or "after_write".
        run: how whole chunks are projected and written: as they stand, or compiled (see `ops/scan.py`).
        at: where the sequences stand.
        x: the tokens.
    """
    banks, pending, position = at
    longest, shortest = (pick(bank.chunk for bank in layout) for pick in (max, min))
    answers: list[Tensor] = []
    queries: list[Tensor] = []  # not answered yet
    parts = x.split(segments(x.k.shape[1], position, shortest))
    for number, part in enumerate(parts):
        count = part.k.shape[1]
        run_project = run if count == shortest else run_eager
        query, new = run_project(project, (rule, layout), banks, part)
        queries.append(query)
        pending = new if pending is None else pending.join(new)
        position += count
        after = []
        for bank, memories in zip(layout, banks, strict=True):
            ends = position % bank.chunk == 0
            asked = None
            if bank.names[0] == MEMORY and (ends or number == len(parts) - 1):
                asked, queries = concatenate(queries), []
            if ends or asked is not None:
                tokens = pending.last((position - 1) % bank.chunk + 1).with_steps(bank.steps)
                whole = ends and (asked is None or asked.shape[1] == bank.chunk)
                write = run if whole else run_eager
                answer, memories = write(_turn, (rule, bank, which, ends), memories, (tokens, asked))
                answers += [] if answer is None else [answer]
            after.append(memories)
        banks = tuple(after)
        if position == longest:
            position, pending = 0, None
    return concatenate(answers), SelfModProgress(banks, pending, position)


def project(
    rule: SelfModRule, layout: tuple[Bank, ...], banks: tuple[Memories, ...], x: Streams
) -> tuple[Tensor, WriteTokens]:
    """Queries `[N, n, d]`, and what the tokens will write."""
    sources = {"k": x.k, "v": x.v, "q": x.q, "eta": x.k, "alpha": x.k}
    added: dict[str, Tensor] = {}
    for bank, memories in zip(layout, banks, strict=True):
        first = bank.first_projection
        if names := bank.names[first:]:
            inputs = torch.stack([sources[name] for name in names], 1)
            outputs = read(memories.weights.select(first, len(bank.names)), inputs)
            added.update(zip(names, (t for group in outputs for t in group.unbind(1)), strict=True))
    k = l2_normalize(x.k + added["k"]) if "k" in added else x.k
    q = l2_normalize(x.q + added["q"]) if "q" in added else x.q
    v = x.v + added["v"] if "v" in added else x.v
    logits = list(x.rates)
    for i, name in enumerate(RATES):
        if name in added:
            logits[i] = logits[i] + added[name].squeeze(-1)
    return q, WriteTokens(k, v, *rule.rates(logits, rule.step_limit(ETA_MAX)))


def _turn(
    rule: SelfModRule,
    bank: Bank,
    which: str,
    ends: bool,
    memories: Memories,
    x: tuple[WriteTokens, Tensor | None],
) -> tuple[Tensor | None, Memories]:
    """Answers to the queries (None = none are asked), and a bank after its chunk, if it `ends`.

    Args:
        x: the tokens of the chunk so far, and the queries `[N, n, d]` of its newest n.
    """
    tokens, queries = x
    solved = _solve(rule, bank, memories, tokens) if ends else None
    answer = None
    if queries is not None:
        answer = queries + _answer(rule, bank, memories, tokens, queries, which, solved)
    return answer, memories if solved is None else finish(solved, memories)


def _solve(rule: SelfModRule, bank: Bank, memories: Memories, tokens: WriteTokens) -> StackWritten:
    """The write of a bank over its tokens."""
    at, targets = aims(rule, bank, memories.weights, tokens)
    return write(rule, memories, at, targets, tokens.prepare(rule.delta))


def aims(
    rule: SelfModRule, bank: Bank, weights: Stack, tokens: WriteTokens
) -> tuple[Pass, tuple[Tensor, ...]]:
    """The memories of a bank at its keys, and the targets v̂ − P k that its write takes them towards."""
    first, count = (0 if rule.self_targets else bank.full), len(bank.names)  # before it: v is the target
    own: tuple[Tensor, ...] = ()
    if first == 0:
        at, at_values = forward(weights, tokens.k, tokens.v)
        own = at_values.answers
    else:
        (at,) = forward(weights, tokens.k)
        if first < count:
            own = read(weights.select(first, count), tokens.v)
    return at, _targets(rule, bank, own, tokens)


def _targets(
    rule: SelfModRule, bank: Bank, own: tuple[Tensor, ...], tokens: WriteTokens
) -> tuple[Tensor, ...]:
    """v̂ − P k of every memory, by output width; `own`: M(v) of those that make their own targets."""
    targets, rates = [], len(bank.names) - bank.full
    if bank.full:
        value = tokens.v.unsqueeze(1)
        target = value + own[0][:, : bank.full] if rule.self_targets else value
        targets.append((target.detach() if rule.stop_gradient_targets else target) - tokens.k.unsqueeze(1))
    if rates:
        target = own[-1][:, -rates:]
        targets.append(target.detach() if rule.stop_gradient_targets else target)
    if len(targets) == 2 and tokens.k.shape[-1] == 1:  # heads as wide as a rate: one output width
        full = targets[0].expand(-1, bank.full, -1, -1)
        return (torch.cat([full, targets[1]], 1),)
    return tuple(targets)


def _answer(
    rule: SelfModRule,
    bank: Bank,
    memories: Memories,
    tokens: WriteTokens,
    queries: Tensor,
    which: str,
    solved: StackWritten | None,
) -> Tensor:
    """M's answers `[N, n, d]` to the newest n of its chunk's tokens; `solved`: the write, if it is due."""
    if which == "chunk":
        return read(memories.weights.select(0, 1), queries)[0].squeeze(1)
    alone = Memories(*(None if s is None else s.select(0, 1) for s in memories))  # type: ignore[arg-type]
    if solved is None:
        solved = _solve(rule, Bank((MEMORY,), bank.chunk), alone, tokens)
    return answer_inside(solved.of_first_memory(), alone, queries, which)[0].squeeze(1)
