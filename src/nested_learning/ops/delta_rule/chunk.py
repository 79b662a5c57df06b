"""The write of one linear memory over a chunk, in closed form (the oracle is `naive.py`).

Inside a chunk the errors are those of the weights at its start, so the recurrence is linear in (W, S):

    (I + diag(η)(a⁻ ∘ KKᵀ)) U = diag(η) [ a⁻₀ ∘ K W₀ᵀ + c⁻₀ ∘ K S₀ᵀ − (c⁻ ∘ KKᵀ) Ê ],   Ê = diag(η) E
    W_C = a₀ W₀ + c₀ S₀ − (a ∘ U + c ∘ Ê)ᵀ K
    S_C = b₀ S₀ − (b ∘ Ê)ᵀ K

with a_{s→t} = Π_{s<j≤t} α_j, b likewise of β, c = a b, and "⁻" the same thing one token earlier.
Without momentum c = a and both parts of the write share one factor, so that U absorbs Ê.
With retention towards W_init, every a₀ W₀ is a₀ W₀ + (1 − a₀) W_init.

Shapes: `N` any leading dimensions, `C` tokens of the chunk, `d` input width, `o` output width. The rates may
have fewer or narrower leading dimensions than the memories: those that broadcast.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops.triangular.inverse import solve_unit_lower


class Decay(NamedTuple):
    """Products of the retentions, or of retentions with momenta, between the tokens of a chunk."""

    inside: Tensor  # [N, C, C] from after token s to after token t, lower triangular
    start: Tensor  # [N, C]    from the start of the chunk to after token t

    def before(self, first: float) -> Decay:
        """The same up to before token t: strictly lower triangular. `first`: value at the first token."""
        inside = F.pad(self.inside, (0, 0, 1, 0))[..., :-1, :]
        return Decay(inside, F.pad(self.start, (1, 0), value=first)[..., :-1])

    def last(self, count: int) -> Decay:
        """The rows of the last `count` tokens."""
        return Decay(self.inside[..., -count:, :], self.start[..., -count:])


class Rates(NamedTuple):
    """Step sizes and decays of a chunk, shared by all memories that are written with them."""

    eta: Tensor  # [N, C]
    a: Decay
    b: Decay | None = None  # None without momentum
    c: Decay | None = None

    def map_over_memories(self) -> Rates:
        """The same rates with a dimension for several memories: `[N, 1, …]`."""
        decays = (d and Decay(d.inside.unsqueeze(-3), d.start.unsqueeze(-2)) for d in self[1:])
        return Rates(self.eta.unsqueeze(-2), *decays)  # type: ignore[arg-type]


def _products(log_factor: Tensor) -> Decay:
    total = log_factor.cumsum(-1)
    size = total.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    inside = (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf).exp()
    return Decay(inside, total.exp())


def make_rates(eta: Tensor, log_alpha: Tensor, log_beta: Tensor | None = None) -> Rates:
    """Rates of one chunk from η, log α and log β (None = no momentum), each `[N, C]`."""
    a = _products(log_alpha)
    if log_beta is None:
        return Rates(eta, a)
    b = _products(log_beta)
    return Rates(eta, a, b, Decay(a.inside @ b.inside, (a.inside @ b.start[..., None])[..., 0]))


class Applied(NamedTuple):
    """What the matrices of a chunk's start answer to some inputs, each `[N, C, o]`."""

    weights: Tensor  # W₀x
    momentum: Tensor | None = None  # S₀x; None without momentum
    initial: Tensor | None = None  # W_init x; None = retention towards zero


def apply(x: Tensor, *matrices: Tensor | None) -> list[Any]:
    """Matrices `[N, o, d]` applied to inputs `x [N, C, d]`, None where there is none."""
    return [None if m is None else x @ m.mT for m in matrices]


class Written(NamedTuple):
    """One memory's write over a chunk: what the closed form needs to read it or to finish it."""

    rates: Rates
    keys: Tensor  # [N, C, d]
    solved: (
        Tensor | None
    )  # U [N, C, o]: what the delta term erases (and, without momentum, Ê); None = nothing
    error: Tensor | None  # Ê [N, C, o]; None where U has absorbed it


def delta_write(rates: Rates, keys: Tensor, error: Tensor, start: Applied, *, delta: bool = True) -> Written:
    """Solve for the write of one chunk.

    Args:
        rates: step sizes and decays of the chunk.
        keys: inputs of the memory `[N, C, d]`.
        error: gradient of the inner loss at the memory's output `[N, C, o]`.
        start: the matrices of the chunk's start applied to the keys.
        delta: whether the delta term erases.
    """
    eta = rates.eta[..., None]
    scaled = eta * error
    if not delta:
        return Written(rates, keys, None, scaled)
    a = rates.a.before(1.0)
    seen = _from_start(a.start, start)
    gram = keys @ keys.mT
    rhs = scaled + eta * seen
    if rates.c is not None and start.momentum is not None:
        c = rates.c.before(0.0)
        rhs = eta * (seen + c.start[..., None] * start.momentum - (c.inside * gram) @ scaled)
    solved = solve_unit_lower(eta * a.inside * gram, rhs)
    return Written(rates, keys, solved, None if rates.c is None else scaled)


def _from_start(a0: Tensor, start: Applied) -> Tensor:
    """What is left of W₀x after retentions `a0 [N, C]`."""
    a0 = a0[..., None]
    return a0 * start.weights if start.initial is None else a0 * start.weights + (1 - a0) * start.initial


def finish(
    written: Written, weights: Tensor, momentum: Tensor | None, initial: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """W and S `[N, o, d]` after the chunk."""
    rates, keys = written.rates, written.keys
    decay = rates.a if rates.c is None else rates.c
    parts = ((rates.a, written.solved), (decay, written.error))
    change = sum(d.inside[..., -1, :, None] * part for d, part in parts if part is not None)
    assert isinstance(change, Tensor)
    a0 = rates.a.start[..., -1, None, None]
    after = a0 * weights - change.mT @ keys
    if initial is not None:
        after = after + (1 - a0) * initial
    if rates.b is None or rates.c is None:
        return after, None
    assert momentum is not None and written.error is not None
    after = after + rates.c.start[..., -1, None, None] * momentum
    added = (rates.b.inside[..., -1, :, None] * written.error).mT @ keys
    return after, rates.b.start[..., -1, None, None] * momentum - added


def read_inside(written: Written, queries: Tensor, start: Applied, read: str) -> Tensor:
    """What the memory answers inside the chunk, before ("before_write") or after each token's own write.

    Args:
        queries: `[N, Q, d]`, those of the last `Q ≤ C` tokens of the chunk.
        start: the matrices of the chunk's start applied to the queries.
    """
    rates, count = written.rates, queries.shape[-2]
    similarity = queries @ written.keys.mT  # [N, Q, C]

    def at(decay: Decay, first: float) -> Decay:
        return (decay.before(first) if read == "before_write" else decay).last(count)

    a = at(rates.a, 1.0)
    answer = _from_start(a.start, start)
    if written.solved is not None:
        answer = answer - (a.inside * similarity) @ written.solved
    if written.error is not None:
        c = a if rates.c is None else at(rates.c, 0.0)
        answer = answer - (c.inside * similarity) @ written.error
        if start.momentum is not None:
            answer = answer + c.start[..., None] * start.momentum
    return answer


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: tuple[Tensor, Tensor, Tensor | None],
    weights: Tensor,
    *,
    chunk_size: int,
    momentum: Tensor | None = None,
    objective: str = "l2",
    read: str = "chunk",
    delta: bool = True,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read and write a linear memory over a sequence, chunk by chunk.

    Args:
        q, k, v: `[N, T, d]`, `[N, T, d]`, `[N, T, o]`; unit-norm keys keep the step bounded.
        rates: η, α and β (None = no momentum), each `[N, T]`.
        weights, momentum: W₀ and S₀ `[N, o, d]`.
        chunk_size: tokens between two refreshes of the errors; the last chunk may be shorter.
        objective: "l2", ½‖Wk − v‖² at the chunk's start, or "dot", −⟨Wk, v⟩ (the gated delta rule).
        read: "chunk", "before_write" or "after_write".
        initial: W_init `[N, o, d]` for retention towards it; None = retention towards zero.

    Returns:
        answers `[N, T, o]`, W and S after the last token (S is None without momentum).
    """
    eta, alpha, beta = rates
    if beta is not None and momentum is None:
        momentum = torch.zeros_like(weights)
    answers, at = [], LinearMemory(weights, momentum, initial)
    logs = (eta, alpha.log(), None if beta is None else beta.log())
    for piece in split_tokens((q, k, v), logs, chunk_size):
        y, at = read_and_write(objective, read, delta, at, piece)
        answers.append(y)
    return torch.cat(answers, -2), at.weights, at.momentum


class LinearMemory(NamedTuple):
    """W, S (None = no momentum) and W_init (None = retention towards zero), each `[N, o, d]`."""

    weights: Tensor
    momentum: Tensor | None = None
    initial: Tensor | None = None


class LinearPiece(NamedTuple):
    """Some tokens: `q, k [N, n, d]`, `v [N, n, o]`, and η, log α and log β (None = no momentum) `[N, n]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    log_alpha: Tensor
    log_beta: Tensor | None


def split_tokens(
    vectors: tuple[Tensor, Tensor, Tensor], logs: tuple[Tensor, Tensor, Tensor | None], size: int
) -> list[LinearPiece]:
    """q, k, v and η, log α, log β in pieces of `size` tokens. (One split: a slice's gradient is long.)"""
    count = -(-vectors[0].shape[-2] // size)
    parts = [torch.split(t, size, -2) for t in vectors]
    rates = [[None] * count if t is None else torch.split(t, size, -1) for t in logs]
    return [LinearPiece(*items) for items in zip(*parts, *rates, strict=True)]


def read_and_write(
    objective: str, read: str, delta: bool, at: LinearMemory, piece: LinearPiece
) -> tuple[Tensor, LinearMemory]:
    """Answers `[N, n, o]` to one chunk, and the memory after it; for the options see `delta_rule`."""
    queries, keys, values, eta, log_alpha, log_beta = piece
    start = Applied(*apply(keys, *at))
    error = start.weights - values if objective == "l2" else -values
    written = delta_write(make_rates(eta, log_alpha, log_beta), keys, error, start, delta=delta)
    asked = Applied(*apply(queries, *at))
    answer = asked.weights if read == "chunk" else read_inside(written, queries, asked, read)
    return answer, LinearMemory(*finish(written, *at), at.initial)
