"""Self-modifying Titans with linear memories over the tokens of one chunk, as one function of explicit state.

    k = l2(M_k x_k),  v = l2(M_v x_v),  q = x_q [or l2(M_q x_q)]
    η = limit · sigmoid(r_η + M_η x_k),  α = sigmoid(r_α + M_α x_k)
    y = M q,  v̂_□ = M_□ v,  every memory is written with keys k and targets v̂_□

where M_□ is a matrix; all of them are read as they are at the start of the chunk, only M also inside it. The
error of M_□, M_□(k − v), has M_□ on its left, and so has everything else in its write. So all memories change
by one factor on their right, the gain: M_□ = M_□,init Γ. Γ is written like one linear memory that starts from
the identity; `README.md` derives this, and `naive.py`, which writes every memory by itself, is the oracle.

Shapes: `N` sequences times heads, `C` tokens of the chunk, `n` new ones, `d` width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.ops.delta_rule.chunk import Applied, LinearMemory, Written, apply, delta_write, finish
from nested_learning.ops.delta_rule.chunk import read_inside as delta_read_inside
from nested_learning.ops.memory_mlp.chunk import WriteTokens, chunk_limit
from nested_learning.ops.self_modifying.chunk import RATES, SelfModRule, Streams
from nested_learning.ops.unit import l2_normalize

CAP = 0.999  # μ: a write adds at most this share of what retention takes away
TINY = 1e-12  # least length and 1 − α in the cap: finite gradients where they vanish


class Starts(NamedTuple):
    """Initial weights of the adaptive projections `[N, rows, d]`, by the stream that they project.

    Args:
        k: M_k (d rows), M_η and M_α (a row each), those that are adaptive; None = none is.
        v, q: M_v, M_q; None = slow.
    """

    k: Tensor | None
    v: Tensor | None
    q: Tensor | None


class GainProgress(NamedTuple):
    """Where sequences stand: Γ (with its momentum, and the identity where forgetting returns to the initial
    memories), the initial memories, and the tokens of the unfinished chunk (None = none)."""

    gain: LinearMemory
    starts: Starts
    pending: WriteTokens | None


class GainPiece(NamedTuple):
    """Some tokens of one chunk, and whether the chunk `ends` with them."""

    x: Streams
    ends: bool


def read_and_write(
    rule: SelfModRule, chunk: int, which: str, at: GainProgress, piece: GainPiece
) -> tuple[Tensor, GainProgress]:
    """Γq `[N, n, d]` for some tokens of a chunk, and where the sequences stand after them.

    Args:
        rule: the options.
        chunk: tokens between two writes.
        which: weights that M is read with: "chunk", "before_write" or "after_write".
    """
    q, new = project(rule, chunk, at, piece.x)
    tokens = new if at.pending is None else at.pending.join(new)
    if which == "chunk" and not piece.ends:
        return q @ at.gain.weights.mT, at._replace(pending=tokens)
    written, asked = write(rule, at.gain, tokens, q)
    answer = asked.weights if which == "chunk" else delta_read_inside(written, q, asked, which)
    if not piece.ends:
        return answer, at._replace(pending=tokens)
    gain = LinearMemory(*finish(written, *at.gain), at.gain.initial)
    return answer, GainProgress(gain, at.starts, None)


def project(rule: SelfModRule, chunk: int, at: GainProgress, x: Streams) -> tuple[Tensor, WriteTokens]:
    """Queries `[N, n, d]`, and what the tokens will write."""
    k, v, q, logits = *x[:3], list(x.rates)
    gain, starts, _ = at
    sources = [s for s, start in zip((x.k, x.v, x.q), starts, strict=True) if start is not None]
    seen = iter(_together(gain.weights, *sources) if sources else ())  # Γx
    if starts.k is not None:
        out = next(seen) @ starts.k.mT
        if "k" in rule.adaptive:
            k = l2_normalize(out[..., : k.shape[-1]])
        own = [name for name in RATES if name in rule.adaptive]
        for name, added in zip(own, out[..., out.shape[-1] - len(own) :].unbind(-1), strict=True):
            logits[RATES.index(name)] = logits[RATES.index(name)] + added
    if starts.v is not None:
        v = l2_normalize(next(seen) @ starts.v.mT)
    if starts.q is not None:
        q = l2_normalize(next(seen) @ starts.q.mT)
    eta, log_alpha, log_beta = rule.rates(logits, rule.step_limit(chunk_limit(chunk)))
    if rule.injection_cap:
        eta = cap(eta, log_alpha, k - v)
    return q, WriteTokens(k, v, eta, log_alpha, log_beta)


def cap(eta: Tensor, log_alpha: Tensor, difference: Tensor) -> Tensor:
    """η ← c(1 − exp(−η/c)) with c = μ(1 − α) / ‖k − v‖: smooth, and below c, whatever η is.

    Args:
        difference: k − v `[N, n, d]`.
    """
    length = difference.square().sum(-1).clamp(min=TINY**2).sqrt()
    inverse = length / (CAP * -torch.expm1(log_alpha)).clamp(min=TINY)  # 1 / c
    return -torch.expm1(-eta * inverse) / inverse


def write(rule: SelfModRule, gain: LinearMemory, tokens: WriteTokens, q: Tensor) -> tuple[Written, Applied]:
    """The write of Γ over the tokens of a chunk, and the matrices of its start at the queries `[N, n, d]`."""
    at_k, at_v, at_q = _together(gain.weights, tokens.k, tokens.v, q)
    resting = gain.initial is not None  # the identity: it answers with its input
    (moved_k,), (moved_q,) = apply(tokens.k, gain.momentum), apply(q, gain.momentum)
    start = Applied(at_k, moved_k, tokens.k if resting else None)
    written = delta_write(tokens.prepare(rule.delta), at_k - at_v, start)
    return written, Applied(at_q, moved_q, q if resting else None)


def _together(matrix: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """`matrix [N, o, d]` at inputs `[N, …, d]`, in one product."""
    return torch.split(torch.cat(inputs, 1) @ matrix.mT, [x.shape[1] for x in inputs], 1)
