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

from nested_learning.ops.scan import put_together, take_apart
from nested_learning.ops.triangular.inverse import inverse_unit_lower


class Decay(NamedTuple):
    """Products of the retentions, or of retentions with momenta, between the tokens of a chunk."""

    inside: Tensor  # [N, C, C] from after token s to after token t, lower triangular
    start: Tensor  # [N, C]    from the start of the chunk to after token t
    end: Tensor  # [N, C]    from after token s to the end of the chunk
    whole: Tensor  # [N]       from the start of the chunk to its end

    @staticmethod
    def of(inside: Tensor, start: Tensor) -> Decay:
        """With the products up to the end, which are the last rows."""
        return Decay(inside, start, inside[..., -1, :], start[..., -1])


class Before(NamedTuple):
    """The same up to before token t."""

    inside: Tensor  # [N, C, C] strictly lower triangular
    start: Tensor  # [N, C]

    @staticmethod
    def of(after: Decay, first: float) -> Before:
        """The rows of one token earlier. `first`: what reaches the first token from the chunk's start."""
        inside = F.pad(after.inside, (0, 0, 1, 0))[..., :-1, :]
        return Before(inside, F.pad(after.start, (1, 0), value=first)[..., :-1])


class Rates(NamedTuple):
    """Step sizes and decays of a chunk, shared by all memories that are written with them."""

    eta: Tensor  # [N, C]
    a: Decay
    a_before: Before
    erasing: Tensor  # diag(η) a⁻ [N, C, C]
    b: Decay | None = None  # None without momentum
    c: Decay | None = None
    c_before: Before | None = None

    def map_over_memories(self) -> Rates:
        """The same rates with a dimension for several memories: `[N, 1, …]`."""
        wide = self.eta.dim() - 1
        tensors: list[Tensor] = []
        frame = take_apart(self, tensors)
        rates: Rates = put_together(frame, iter([t.unsqueeze(wide) for t in tensors]))
        return rates


def _products(log_factor: Tensor) -> Decay:
    total = log_factor.cumsum(-1)
    size = total.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    inside = (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf).exp()
    return Decay.of(inside, total.exp())


def make_rates(eta: Tensor, log_alpha: Tensor, log_beta: Tensor | None = None) -> Rates:
    """Rates of one chunk from η, log α and log β (None = no momentum), each `[N, C]`."""
    a = _products(log_alpha)
    a_before = Before.of(a, 1.0)
    erasing = eta[..., None] * a_before.inside
    if log_beta is None:
        return Rates(eta, a, a_before, erasing)
    b = _products(log_beta)
    c = Decay.of(a.inside @ b.inside, (a.inside @ b.start[..., None])[..., 0])
    return Rates(eta, a, a_before, erasing, b, c, Before.of(c, 0.0))


class Prepared(NamedTuple):
    """What of the write of a chunk depends on its keys and rates only, not on the memory."""

    rates: Rates
    keys: Tensor  # [N, C, d]
    solver: Tensor | None  # (I + diag(η)(a⁻ ∘ KKᵀ))⁻¹ diag(η) [N, C, C]; None without the delta term
    moved: Tensor | None  # c⁻ ∘ KKᵀ [N, C, C]; None without the delta term or momentum


def prepare(rates: Rates, keys: Tensor, *, delta: bool = True) -> Prepared:
    """For a chunk, or for many at once: keys `[N, C, d]`. `delta`: whether the delta term erases."""
    if not delta:
        return Prepared(rates, keys, None, None)
    gram = keys @ keys.mT
    solver = inverse_unit_lower(rates.erasing * gram) * rates.eta[..., None, :]
    return Prepared(rates, keys, solver, None if rates.c_before is None else rates.c_before.inside * gram)


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


def delta_write(ready: Prepared, error: Tensor, start: Applied) -> Written:
    """Solve for the write of one chunk.

    Args:
        ready: what is known before.
        error: gradient of the inner loss at the memory's output `[N, C, o]`.
        start: the matrices of the chunk's start applied to the keys.
    """
    rates, keys, solver, moved = ready
    if solver is None:
        return Written(rates, keys, None, rates.eta[..., None] * error)
    seen = _from_start(rates.a_before.start, start)
    if rates.c_before is None or start.momentum is None or moved is None:
        return Written(rates, keys, solver @ (error + seen), None)
    scaled = rates.eta[..., None] * error
    seen = seen + rates.c_before.start[..., None] * start.momentum - moved @ scaled
    return Written(rates, keys, solver @ seen, scaled)


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
    change = sum(d.end[..., None] * part for d, part in parts if part is not None)
    assert isinstance(change, Tensor)
    a0 = rates.a.whole[..., None, None]
    after = a0 * weights - change.mT @ keys
    if initial is not None:
        after = after + (1 - a0) * initial
    if rates.b is None or rates.c is None:
        return after, None
    assert momentum is not None and written.error is not None
    after = after + rates.c.whole[..., None, None] * momentum
    added = (rates.b.end[..., None] * written.error).mT @ keys
    return after, rates.b.whole[..., None, None] * momentum - added


def read_inside(written: Written, queries: Tensor, start: Applied, read: str) -> Tensor:
    """What the memory answers inside the chunk, before ("before_write") or after each token's own write.

    Args:
        queries: `[N, Q, d]`, those of the last `Q ≤ C` tokens of the chunk.
        start: the matrices of the chunk's start applied to the queries.
    """
    rates, count = written.rates, queries.shape[-2]
    similarity = queries @ written.keys.mT  # [N, Q, C]

    earlier = read == "before_write"
    a, a0, *_ = rates.a_before if earlier else rates.a
    answer = _from_start(a0[..., -count:], start)
    if written.solved is not None:
        answer = answer - (a[..., -count:, :] * similarity) @ written.solved
    if written.error is not None:
        c, c0, *_ = (rates.c_before if earlier else rates.c) or (a, a0)
        answer = answer - (c[..., -count:, :] * similarity) @ written.error
        if start.momentum is not None:
            answer = answer + c0[..., -count:, None] * start.momentum
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
    ready = prepare(make_rates(eta, log_alpha, log_beta), keys, delta=delta)
    written = delta_write(ready, error, start)
    asked = Applied(*apply(queries, *at))
    answer = asked.weights if read == "chunk" else read_inside(written, queries, asked, read)
    return answer, LinearMemory(*finish(written, *at), at.initial)
