"""The Triton kernel that writes the memories of self-modifying Titans over one chunk; see `triton.py`.

Letters are those of `../memory_mlp/README.md`; what lies where in the scratch memory is said in `solve`.
Constants of all functions: M memories, C tokens of a chunk, D width of a head, S numbers of a scratch
matrix, C = 2^LOG, R rows at a time, P precision of products; FULL memories are as wide as a head; IK, IV, IQ,
IE, IA are the numbers of those that project k, v, q, η, α (−1: none); OWN: memories make their own targets;
RETAIN: α < 1; CONTROL: η is bounded by 2 α.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nested_learning.ops.memory_mlp.chunk import CLAMP
from nested_learning.ops.tiles import (
    by,
    by_turned,
    hidden,
    hidden_back,
    invert_unit_lower,
    log_sigmoid,
    rows,
    turned,
    wait,
)

SLOTS = tl.constexpr(16)  # matrices of scratch memory per program
VECTORS = tl.constexpr(13)  # vectors of it, always in float32
STEPS_MOST = tl.constexpr(CLAMP)
VARYING = ("N", "T", "at", "write", "project", "answer")
"""Arguments whose values do not ask for a compilation of their own: one takes a minute."""
NORM = tl.constexpr(1e-6)  # in the norm of keys and queries, as in `ops/unit.py`


@triton.jit
def joined(x, seen, n, m: tl.constexpr, role: tl.constexpr, N, T, at, first, M: tl.constexpr,
           C: tl.constexpr, D: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """Rows of a stream (k, v, q are roles 0, 1, 2), with what memory m adds to it (−1: nothing)."""
    value = tl.load(rows(x + ((role * N + n) * T + at) * D, first, R, D))
    if m >= 0:
        value += tl.load(rows(seen + (n * M + m) * C * D, first, R, D))
    return value


@triton.jit
def unit(x):
    """Rows of unit length, and what they were multiplied with."""
    scale = tl.rsqrt(tl.sum(x * x, 1) + NORM)[:, None]
    return x * scale, scale


@triton.jit
def logits(rates, seen, n, m: tl.constexpr, which: tl.constexpr, N, T, at, M: tl.constexpr,
           C: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Logits `[C]` of a rate (η, α are 0, 1), with what memory m adds to them (−1: nothing)."""
    t = tl.arange(0, C)
    value = tl.load(rates + (which * N + n) * T + at + t)
    if m >= 0:
        value += tl.load(seen + ((n * M + m) * C + t) * D)
    return value


@triton.jit
def chunk_rates(rates, seen, n, N, T, at, limit, M: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
                IE: tl.constexpr, IA: tl.constexpr, RETAIN: tl.constexpr, CONTROL: tl.constexpr):  # fmt: skip
    """η and log α of the chunk `[C]`, η without the factor of a bank."""
    eta = limit * tl.sigmoid(logits(rates, seen, n, IE, 0, N, T, at, M, C, D))
    log_alpha = tl.zeros([C], tl.float32)
    if RETAIN:
        log_alpha = log_sigmoid(logits(rates, seen, n, IA, 1, N, T, at, M, C, D))
    if CONTROL:
        eta = tl.minimum(eta, tl.exp(log_alpha) * STEPS_MOST)
    return eta, log_alpha


@triton.jit
def _systems(base, vectors, SCALED: tl.constexpr, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
             LOG: tl.constexpr, R: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """U with (I + diag(η)(a⁻ ∘ KKᵀ)) U = rhs for both layers, or SCALED: a ∘ U; and the matrices' inverses.

    They lie in the slots that `solve` says.
    """
    j = tl.arange(0, C)
    total, end = tl.load(vectors + C + j), tl.load(vectors + 2 * C - 1)
    for first in range(0, C, R):
        i = first + tl.arange(0, R)
        scale = tl.load(vectors + i)[:, None] * decay(vectors, total, i, j, C)
        gram = by_turned(tl.load(rows(base, first, R, D)), base, D, C, P)
        tl.store(rows(base + 12 * S, first, R, C), scale * gram)
        gram = by_turned(tl.load(rows(base + 3 * S, first, R, D)), base + 3 * S, D, C, P)
        tl.store(rows(base + 13 * S, first, R, C), scale * gram)
    wait()
    invert_unit_lower(base + 12 * S, base + 10 * S, 2, S, C, LOG, "tf32" if P == "bf16" else P)
    for first in range(0, C, R):
        u_2 = by(tl.load(rows(base + 10 * S, first, R, C)), base + 14 * S, C, D, P)
        u_1 = by(tl.load(rows(base + 11 * S, first, R, C)), base + 15 * S, C, D, P)
        if SCALED:
            left = tl.exp(end - tl.load(vectors + C + first + tl.arange(0, R)))[:, None]
            u_2 *= left
            u_1 *= left
        tl.store(rows(base + 8 * S, first, R, D), u_2)
        tl.store(rows(base + 9 * S, first, R, D), u_1)
    wait()


@triton.jit
def decay(vectors, total, i, j, C: tl.constexpr):
    """Rows i of a⁻, strictly lower triangular."""
    before = tl.load(vectors + 2 * C + i)
    earlier = i[:, None] > j[None, :]
    return tl.where(earlier, tl.exp(tl.where(earlier, before[:, None] - total[None, :], 0.0)), 0.0)


@triton.jit
def solve(x, rates, seen, w2, w1, base, vectors, n, m, N, T, at, limit, factor, KEEP: tl.constexpr,
          M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, LOG: tl.constexpr,
          R: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr, IK: tl.constexpr, IV: tl.constexpr,
          IE: tl.constexpr, IA: tl.constexpr, OWN: tl.constexpr, RETAIN: tl.constexpr,
          CONTROL: tl.constexpr):  # fmt: skip
    """The write of a chunk, before anything is written.

    Leaves K and U in slots 0 and 3, both solutions in 8 and 9, both inverses in 10 and 11, both systems in 12
    and 13, right-hand sides in 14 and 15; and η, the sums of log α up to after and up to before every token
    in vectors 0 to 2. KEEP, for the backward pass: also V, Z, U at the values, e₁, answers, W₁ᵀe₁ in slots 1,
    2 and 4 to 7; otherwise the solutions are multiplied by a.
    """
    t = tl.arange(0, C)
    eta, log_alpha = chunk_rates(rates, seen, n, N, T, at, limit, M, C, D, IE, IA, RETAIN, CONTROL)
    total = tl.cumsum(log_alpha, 0)
    tl.store(vectors + t, eta * factor)
    tl.store(vectors + C + t, total)
    tl.store(vectors + 2 * C + t, total - log_alpha)
    wait()
    skip = tl.where(m < FULL, 1.0, 0.0)
    own = tl.where(m < FULL, 1.0 * OWN, 1.0)
    for first in range(0, C, R):
        i = first + tl.arange(0, R)
        step, kept = tl.load(vectors + i)[:, None], tl.exp(tl.load(vectors + 2 * C + i))[:, None]
        # values first, and everything is written as soon as it is known: few tiles are held at a time
        v = joined(x, seen, n, IV, 1, N, T, at, first, M, C, D, R)
        _, _, _, u_v = hidden(by_turned(v, w2, D, D, P))
        target = own * by_turned(u_v, w1, D, D, P) + skip * v
        if KEEP:
            tl.store(rows(base + S, first, R, D), v)
            tl.store(rows(base + 4 * S, first, R, D), u_v)
        k = joined(x, seen, n, IK, 0, N, T, at, first, M, C, D, R)
        if IK >= 0:
            k, _ = unit(k)
        tl.store(rows(base, first, R, D), k)
        z = by_turned(k, w2, D, D, P)
        _, _, _, u = hidden(z)
        tl.store(rows(base + 3 * S, first, R, D), u)
        answer = by_turned(u, w1, D, D, P)
        error = answer + skip * k - target
        tl.store(rows(base + 15 * S, first, R, D), step * (error + kept * answer))
        if KEEP:
            tl.store(rows(base + 2 * S, first, R, D), z)
            tl.store(rows(base + 5 * S, first, R, D), error)
            tl.store(rows(base + 6 * S, first, R, D), answer)
        at_hidden = by(error, w1, D, D, P)
        if KEEP:
            tl.store(rows(base + 7 * S, first, R, D), at_hidden)
        tl.store(rows(base + 14 * S, first, R, D), step * (hidden_back(z, at_hidden) + kept * z))
    wait()
    _systems(base, vectors, not KEEP, C, D, S, LOG, R, P)


@triton.jit
def _finish(keys, scaled, weights, after, vectors, C: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
            P: tl.constexpr):  # fmt: skip
    """W_C = a₀ W₀ − (a ∘ U)ᵀ K; a `wait` is due."""
    end = tl.exp(tl.load(vectors + 2 * C - 1))
    for first in range(0, D, R):
        change = by(turned(scaled, first, R, D, C), keys, C, D, P)
        tl.store(rows(after, first, R, D), end * tl.load(rows(weights, first, R, D)) - change)


@triton.jit(do_not_specialize=VARYING)
def forward(x, rates, seen, seen_next, w2, w1, w2_next, w1_next, y, scratch, vectors, N, T, at, limit,
            steps, write, project, answer, M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
            LOG: tl.constexpr, R: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr, SLOW: tl.constexpr,
            IK: tl.constexpr, IV: tl.constexpr, IQ: tl.constexpr, IE: tl.constexpr, IA: tl.constexpr,
            OWN: tl.constexpr, RETAIN: tl.constexpr, CONTROL: tl.constexpr):  # fmt: skip
    """Write the chunk from token `at` and, if asked for, `answer` in it; then `project` the tokens after it.

    Without `write` only the latter. These three are 0 or 1. From memory SLOW on, η is multiplied by `steps`.

    x `[3, N, T, D]`: k, v, q; rates `[2, N, T]`; seen `[N, M, C, D]`: what projections add; w2, w1
    `[N, M, D, D]`; y `[N, T, D]`.
    """
    program = tl.program_id(0).to(tl.int64)
    n, m = program // M, program % M
    base, vectors = scratch + program * SLOTS * S, vectors + program * VECTORS * C
    w2, w1 = w2 + program * D * D, w1 + program * D * D
    w2_next, w1_next = w2_next + program * D * D, w1_next + program * D * D
    if write:
        factor = tl.where(m < SLOW, 1.0, steps)
        solve(x, rates, seen, w2, w1, base, vectors, n, m, N, T, at, limit, factor, False, M, C, D, S, LOG, R,
              P, FULL, IK, IV, IE, IA, OWN, RETAIN, CONTROL)  # fmt: skip
        _finish(base, base + 8 * S, w2, w2_next, vectors, C, D, R, P)
        _finish(base + 3 * S, base + 9 * S, w1, w1_next, vectors, C, D, R, P)
        wait()
        if (answer != 0) & (m == 0):
            _answer(x, seen, w2, w1, y, n, N, T, at, M, C, D, R, P, IQ)
    if (project != 0) & (m > 0):
        source = x + (role_of(m, IV, IQ) * N + n) * T * D + (at + write * C) * D
        for first in range(0, C, R):
            _, _, _, u = hidden(by_turned(tl.load(rows(source, first, R, D)), w2_next, D, D, P))
            tl.store(rows(seen_next + program * C * D, first, R, D), by_turned(u, w1_next, D, D, P))


@triton.jit
def role_of(m, IV: tl.constexpr, IQ: tl.constexpr):
    """Which of k, v, q memory m projects."""
    return tl.where(m == IV, 1, tl.where(m == IQ, 2, 0))


@triton.jit
def _answer(x, seen, w2, w1, y, n, N, T, at, M: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
            R: tl.constexpr, P: tl.constexpr, IQ: tl.constexpr):  # fmt: skip
    """y = q + M(q), with the weights of the chunk's start."""
    for first in range(0, C, R):
        q = joined(x, seen, n, IQ, 2, N, T, at, first, M, C, D, R)
        if IQ >= 0:
            q, _ = unit(q)
        _, _, _, u = hidden(by_turned(q, w2, D, D, P))
        tl.store(rows(y + (n * T + at) * D, first, R, D), q + by_turned(u, w1, D, D, P))
