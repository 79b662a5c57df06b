"""The Triton kernel that writes the memories of self-modifying Titans over one chunk; see `triton.py`.

Letters are those of `../memory_mlp/README.md`; what lies where in the scratch memory is said in `solve`.
Constants of all functions: M memories, C tokens of a chunk, D width of a head, S numbers of a scratch
matrix, C = 2^LOG, R rows at a time, B columns of a product at a time, P precision of products; FULL memories
are as wide as a head; IK, IV, IQ, IE, IA are the numbers of those that project k, v, q, η, α (−1: none);
OWN: memories make their own targets; RETAIN: α < 1; CONTROL: η is bounded by 2 α.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nested_learning.ops.memory_mlp.chunk import CLAMP
from nested_learning.ops.tiles import (
    hidden,
    hidden_back,
    invert_unit_lower,
    log_sigmoid,
    put,
    rows,
    times,
    times_turned,
    turned_times,
)

SLOTS = tl.constexpr(17)  # matrices of scratch memory per program
VECTORS = tl.constexpr(8)  # vectors of scratch memory per program
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
def _system(keys, rhs, solution, strict, inverse, vectors, C: tl.constexpr, D: tl.constexpr,
            LOG: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """U with (I + diag(η)(a⁻ ∘ KKᵀ)) U = rhs, and the inverse of the matrix."""
    j = tl.arange(0, C)
    total = tl.load(vectors + C + j)
    for first in range(0, C, R):
        i = first + tl.arange(0, R)
        between = decay(vectors, total, i, j, C)
        eta = tl.load(vectors + i)[:, None]
        put(rows(strict, first, R, C), eta * between * times_turned(keys, keys, first, R, D, C, B, P))
    invert_unit_lower(strict, inverse, C, LOG, P)
    for first in range(0, C, R):
        put(rows(solution, first, R, D), times(inverse, rhs, first, R, C, D, B, P))


@triton.jit
def decay(vectors, total, i, j, C: tl.constexpr):
    """Rows i of a⁻, strictly lower triangular."""
    before = tl.load(vectors + 2 * C + i)
    earlier = i[:, None] > j[None, :]
    return tl.where(earlier, tl.exp(tl.where(earlier, before[:, None] - total[None, :], 0.0)), 0.0)


@triton.jit
def solve(x, rates, seen, w2, w1, base, vectors, n, m, N, T, at, limit, factor, M: tl.constexpr,
          C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, LOG: tl.constexpr, R: tl.constexpr,
          B: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr, IK: tl.constexpr, IV: tl.constexpr,
          IE: tl.constexpr, IA: tl.constexpr, OWN: tl.constexpr, RETAIN: tl.constexpr,
          CONTROL: tl.constexpr):  # fmt: skip
    """The write of a chunk, before anything is written.

    Leaves K, V, Z, U, U at the values, e₁, answers, W₁ᵀe₁, both solutions and both inverses in slots 0 to 11,
    the system in 12, right-hand sides in 14 and 15; and η, the sums of log α up to after and up to before
    every token in vectors 0 to 2.
    """
    t = tl.arange(0, C)
    eta, log_alpha = chunk_rates(rates, seen, n, N, T, at, limit, M, C, D, IE, IA, RETAIN, CONTROL)
    total = tl.cumsum(log_alpha, 0)
    put(vectors + t, eta * factor)
    put(vectors + C + t, total)
    put(vectors + 2 * C + t, total - log_alpha)
    for first in range(0, C, R):
        k = joined(x, seen, n, IK, 0, N, T, at, first, M, C, D, R)
        if IK >= 0:
            k, _ = unit(k)
        put(rows(base, first, R, D), k)
        put(rows(base + S, first, R, D), joined(x, seen, n, IV, 1, N, T, at, first, M, C, D, R))
    for first in range(0, C, R):
        z = times_turned(base, w2, first, R, D, D, B, P)
        put(rows(base + 2 * S, first, R, D), z)
        _, _, _, u = hidden(z)
        put(rows(base + 3 * S, first, R, D), u)
        _, _, _, u = hidden(times_turned(base + S, w2, first, R, D, D, B, P))
        put(rows(base + 4 * S, first, R, D), u)
    skip = tl.where(m < FULL, 1.0, 0.0)
    own = tl.where(m < FULL, 1.0 * OWN, 1.0)
    for first in range(0, C, R):
        i = first + tl.arange(0, R)
        answer = times_turned(base + 3 * S, w1, first, R, D, D, B, P)
        error = answer - own * times_turned(base + 4 * S, w1, first, R, D, D, B, P)
        error += skip * (tl.load(rows(base, first, R, D)) - tl.load(rows(base + S, first, R, D)))
        put(rows(base + 5 * S, first, R, D), error)
        put(rows(base + 6 * S, first, R, D), answer)
        kept = tl.exp(tl.load(vectors + 2 * C + i))[:, None]
        put(rows(base + 15 * S, first, R, D), tl.load(vectors + i)[:, None] * (error + kept * answer))
    for first in range(0, C, R):
        i = first + tl.arange(0, R)
        at_hidden = times(base + 5 * S, w1, first, R, D, D, B, P)
        put(rows(base + 7 * S, first, R, D), at_hidden)
        z = tl.load(rows(base + 2 * S, first, R, D))
        kept = tl.exp(tl.load(vectors + 2 * C + i))[:, None]
        put(rows(base + 14 * S, first, R, D),
            tl.load(vectors + i)[:, None] * (hidden_back(z, at_hidden) + kept * z))  # fmt: skip
    _system(base, base + 14 * S, base + 8 * S, base + 12 * S, base + 10 * S, vectors, C, D, LOG, R, B, P)
    _system(base + 3 * S, base + 15 * S, base + 9 * S, base + 12 * S, base + 11 * S, vectors, C, D, LOG, R,
            B, P)  # fmt: skip


@triton.jit
def _finish(keys, solution, weights, after, spare, vectors, C: tl.constexpr, D: tl.constexpr,
            R: tl.constexpr, B: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """W_C = a₀ W₀ − (a ∘ U)ᵀ K."""
    end = tl.load(vectors + 2 * C - 1)
    for first in range(0, C, R):
        left = tl.exp(end - tl.load(vectors + C + first + tl.arange(0, R)))[:, None]
        put(rows(spare, first, R, D), left * tl.load(rows(solution, first, R, D)))
    for first in range(0, D, R):
        change = turned_times(spare, keys, first, R, D, C, D, B, P)
        put(rows(after, first, R, D), tl.exp(end) * tl.load(rows(weights, first, R, D)) - change)


@triton.jit(do_not_specialize=VARYING)
def forward(x, rates, seen, seen_next, w2, w1, w2_next, w1_next, y, scratch, N, T, at, limit, steps, write,
            project, answer, M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
            LOG: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr,
            SLOW: tl.constexpr, IK: tl.constexpr, IV: tl.constexpr, IQ: tl.constexpr, IE: tl.constexpr,
            IA: tl.constexpr, OWN: tl.constexpr, RETAIN: tl.constexpr, CONTROL: tl.constexpr):  # fmt: skip
    """Write the chunk from token `at` and, if asked for, `answer` in it; then `project` the tokens after it.

    Without `write` only the latter. These three are 0 or 1. From memory SLOW on, η is multiplied by `steps`.

    x `[3, N, T, D]`: k, v, q; rates `[2, N, T]`; seen `[N, M, C, D]`: what projections add; w2, w1
    `[N, M, D, D]`; y `[N, T, D]`.
    """
    program = tl.program_id(0).to(tl.int64)
    n, m = program // M, program % M
    base = scratch + program * (SLOTS * S + VECTORS * C)
    vectors = base + SLOTS * S
    w2, w1 = w2 + program * D * D, w1 + program * D * D
    w2_next, w1_next = w2_next + program * D * D, w1_next + program * D * D
    if write:
        factor = tl.where(m < SLOW, 1.0, steps)
        solve(x, rates, seen, w2, w1, base, vectors, n, m, N, T, at, limit, factor, M, C, D, S, LOG, R, B,
              P, FULL, IK, IV, IE, IA, OWN, RETAIN, CONTROL)  # fmt: skip
        _finish(base, base + 8 * S, w2, w2_next, base + 4 * S, vectors, C, D, R, B, P)
        _finish(base + 3 * S, base + 9 * S, w1, w1_next, base + 4 * S, vectors, C, D, R, B, P)
        if (answer != 0) & (m == 0):
            _answer(x, seen, w2, w1, y, base, n, N, T, at, M, C, D, S, R, B, P, IQ)
    if (project != 0) & (m > 0):
        source = x + (role_of(m, IV, IQ) * N + n) * T * D + (at + write * C) * D
        for first in range(0, C, R):
            _, _, _, u = hidden(times_turned(source, w2_next, first, R, D, D, B, P))
            put(rows(base, first, R, D), u)
        for first in range(0, C, R):
            tl.store(rows(seen_next + program * C * D, first, R, D),
                     times_turned(base, w1_next, first, R, D, D, B, P))  # fmt: skip


@triton.jit
def role_of(m, IV: tl.constexpr, IQ: tl.constexpr):
    """Which of k, v, q memory m projects."""
    return tl.where(m == IV, 1, tl.where(m == IQ, 2, 0))


@triton.jit
def _answer(x, seen, w2, w1, y, base, n, N, T, at, M: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
            S: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr,
            IQ: tl.constexpr):  # fmt: skip
    """y = q + M(q), with the weights of the chunk's start."""
    for first in range(0, C, R):
        q = joined(x, seen, n, IQ, 2, N, T, at, first, M, C, D, R)
        if IQ >= 0:
            q, _ = unit(q)
        put(rows(base, first, R, D), q)
        _, _, _, u = hidden(times_turned(base, w2, first, R, D, D, B, P))
        put(rows(base + S, first, R, D), u)
    for first in range(0, C, R):
        answer = tl.load(rows(base, first, R, D)) + times_turned(base + S, w1, first, R, D, D, B, P)
        tl.store(rows(y + (n * T + at) * D, first, R, D), answer)
