"""The write of one linear memory over a chunk, in closed form (the oracle is `naive.py`).

Inside a chunk the errors are those of the weights at its start, so the recurrence is linear in (W, S):

    (I + diag(η)(a⁻ ∘ KKᵀ)) U = diag(η) [ a⁻₀ ∘ K W₀ᵀ + c⁻₀ ∘ K S₀ᵀ − (c⁻ ∘ KKᵀ) Ê ],   Ê = diag(η) E
    W_C = a₀ W₀ + c₀ S₀ − (a ∘ U + c ∘ Ê)ᵀ K
    S_C = b₀ S₀ − (b ∘ Ê)ᵀ K

with a_{s→t} = Π_{s<j≤t} α_j, b likewise of β, c = a b, and "⁻" the same thing one token earlier.
Without momentum c = a and both parts of the write share one factor, so that U absorbs Ê.

Shapes: `N` any leading dimensions, `C` tokens of the chunk, `d` input width, `o` output width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops.triangular import solve_unit_lower


@dataclass(frozen=True)
class Decay:
    """Products of the retentions, or of retentions with momenta, between the tokens of a chunk."""

    inside: Tensor  # [N, C, C] from after token s to after token t, lower triangular
    start: Tensor  # [N, C]    from the start of the chunk to after token t

    @property
    def inside_before(self) -> Tensor:
        """`inside` up to the moment before token t: strictly lower triangular."""
        return F.pad(self.inside, (0, 0, 1, 0))[..., :-1, :]

    def start_before(self, first: float) -> Tensor:
        """`start` up to the moment before token t; `first` is its value before the first token."""
        return F.pad(self.start, (1, 0), value=first)[..., :-1]

    @property
    def to_end(self) -> Tensor:
        """From after token s to the end of the chunk `[N, C]`."""
        return self.inside[..., -1, :]

    @property
    def start_to_end(self) -> Tensor:
        """Over the whole chunk, ready to scale a matrix `[N, 1, 1]`."""
        return self.start[..., -1, None, None]


@dataclass(frozen=True)
class Rates:
    """Step sizes and decays of a chunk, shared by all memories that are written with them."""

    eta: Tensor  # [N, C]
    a: Decay
    b: Decay | None = None  # None without momentum
    c: Decay | None = None

    @property
    def write(self) -> Decay:
        """How a written error persists: c with momentum, a without."""
        return self.a if self.c is None else self.c


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
    c = Decay(a.inside @ b.inside, (a.inside @ b.start[..., None])[..., 0])
    return Rates(eta, a, b, c)


@dataclass(frozen=True)
class Written:
    """One memory's write over a chunk: what the closed form needs to read or to finish it."""

    rates: Rates
    keys: Tensor  # [N, C, d]
    kept: Tensor | None  # U [N, C, o]: what the delta term erases (and, without momentum, Ê); None if nothing
    error: Tensor | None  # Ê [N, C, o]; None where U has absorbed it

    def _combined(self, a: Tensor, c: Tensor) -> Tensor:
        """a ∘ U + c ∘ Ê for coefficients `[N, C]`."""
        if self.error is None:
            assert self.kept is not None
            return a[..., None] * self.kept
        erased = c[..., None] * self.error
        return erased if self.kept is None else erased + a[..., None] * self.kept


def delta_write(
    rates: Rates,
    keys: Tensor,
    error: Tensor,
    *,
    start: tuple[Tensor, Tensor | None] | None,
    initial: Tensor | None = None,
    delta: bool = True,
) -> Written:
    """Solve for the write of one chunk.

    Args:
        rates: step sizes and decays of the chunk.
        keys: inputs of the memory `[N, C, d]`.
        error: gradient of the inner loss at the memory's output `[N, C, o]`.
        start: W₀ and S₀ applied to the keys, each `[N, C, o]`; S₀ None without momentum. May be None
            without the delta term.
        initial: W_init applied to the keys `[N, C, o]`, for retention towards the initial state.
        delta: whether the delta term erases.
    """
    scaled = rates.eta[..., None] * error
    if not delta:
        return Written(rates, keys, None, scaled)
    assert start is not None
    from_weights, from_momentum = start
    a0 = rates.a.start_before(1.0)[..., None]
    seen = a0 * from_weights if initial is None else a0 * from_weights + (1 - a0) * initial
    gram = keys @ keys.mT
    if rates.c is None:
        rhs = torch.addcmul(scaled, rates.eta[..., None], seen)
    else:
        assert from_momentum is not None
        seen = seen + rates.c.start_before(0.0)[..., None] * from_momentum
        rhs = rates.eta[..., None] * (seen - (rates.c.inside_before * gram) @ scaled)
    kept = solve_unit_lower(rates.eta[..., None] * rates.a.inside_before * gram, rhs)
    return Written(rates, keys, kept, None if rates.c is None else scaled)


def finish(
    written: Written, weights: Tensor, momentum: Tensor | None, initial: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """W and S `[N, o, d]` after the chunk."""
    rates = written.rates
    change = written._combined(rates.a.to_end, rates.write.to_end)
    a0 = rates.a.start_to_end
    after = a0 * weights - change.mT @ written.keys
    if initial is not None:
        after = after + (1 - a0) * initial
    if rates.b is None or rates.c is None:
        return after, None
    assert momentum is not None and written.error is not None
    after = after + rates.c.start_to_end * momentum
    error = rates.b.to_end[..., None] * written.error
    return after, rates.b.start_to_end * momentum - error.mT @ written.keys


def read_inside(
    written: Written,
    queries: Tensor,
    start: tuple[Tensor, Tensor | None],
    read: str,
    initial: Tensor | None = None,
) -> Tensor:
    """What the memory answers inside the chunk, before ("before_write") or after each token's own write.

    Args:
        queries: `[N, Q, d]`, those of the last `Q ≤ C` tokens of the chunk.
        start: W₀ and S₀ applied to the queries, each `[N, Q, o]`; S₀ None without momentum.
        initial: W_init applied to the queries, for retention towards the initial state.
    """
    rates, last = written.rates, queries.shape[-2]
    before = read == "before_write"
    similarity = queries @ written.keys.mT  # [N, Q, C]

    def inside(decay: Decay) -> Tensor:
        coefficients = decay.inside_before if before else decay.inside
        return coefficients[..., -last:, :] * similarity

    def from_start(decay: Decay, first: float) -> Tensor:
        coefficients = decay.start_before(first) if before else decay.start
        return coefficients[..., -last:, None]

    from_weights, from_momentum = start
    a0 = from_start(rates.a, 1.0)
    answer = a0 * from_weights if initial is None else a0 * from_weights + (1 - a0) * initial
    if rates.c is not None:
        assert from_momentum is not None
        answer = answer + from_start(rates.c, 0.0) * from_momentum
    if written.kept is not None:
        answer = answer - inside(rates.a) @ written.kept
    if written.error is not None:
        answer = answer - inside(rates.write) @ written.error
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
    answers = []
    vectors = [
        torch.split(t, chunk_size, -2) for t in (k, v, q)
    ]  # one split: the gradient of a slice is long
    scalars = [
        torch.split(t, chunk_size, -1) for t in (eta, alpha.log(), *(() if beta is None else (beta.log(),)))
    ]
    for keys, values, queries, *logs in zip(*vectors, *scalars, strict=True):
        chunk = make_rates(*logs)

        def at_start(inputs: Tensor) -> tuple[Tensor, Tensor | None]:
            return inputs @ weights.mT, None if momentum is None else inputs @ momentum.mT  # noqa: B023

        start = at_start(keys)
        error = start[0] - values if objective == "l2" else -values
        rest = None if initial is None else keys @ initial.mT
        written = delta_write(chunk, keys, error, start=start, initial=rest, delta=delta)
        if read == "chunk":
            answers.append(queries @ weights.mT)
        else:
            toward = None if initial is None else queries @ initial.mT
            answers.append(read_inside(written, queries, at_start(queries), read, toward))
        weights, momentum = finish(written, weights, momentum, initial)
    return torch.cat(answers, -2), weights, momentum
