"""The Triton kernel that takes gradients through one chunk of self-modifying Titans; see `triton.py`.

Derived by hand from `forward.py`, in the reverse order of its functions. Constants as there; STOP: no
gradient through targets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nested_learning.ops.self_modifying.forward import (
    SLOTS,
    STEPS_MOST,
    VARYING,
    VECTORS,
    decay,
    joined,
    logits,
    role_of,
    solve,
    unit,
)
from nested_learning.ops.tiles import (
    by,
    by_turned,
    get,
    hidden,
    hidden_and_error_back,
    hidden_back,
    log_sigmoid,
    rows,
    turned,
    wait,
)


@triton.jit
def _unit_back(x, grad):
    """Gradient at x, from that at its rows of unit length."""
    y, scale = unit(x)
    return scale * (grad - y * tl.sum(y * grad, 1)[:, None])


@triton.jit
def _rates_back(rates, seen, n, N, T, at, limit, grad_eta, grad_alpha, M: tl.constexpr, C: tl.constexpr,
                D: tl.constexpr, IE: tl.constexpr, IA: tl.constexpr, RETAIN: tl.constexpr,
                CONTROL: tl.constexpr):  # fmt: skip
    """Gradients at the logits, from those at η and log α."""
    share = tl.sigmoid(logits(rates, seen, n, IE, 0, N, T, at, M, C, D))
    logit = logits(rates, seen, n, IA, 1, N, T, at, M, C, D)
    log_alpha = tl.zeros([C], tl.float32)
    if RETAIN:
        log_alpha = log_sigmoid(logit)
    if CONTROL:
        bound = tl.exp(log_alpha) * STEPS_MOST
        free = limit * share <= bound
        grad_alpha += tl.where(free, 0.0, grad_eta * bound)
        grad_eta = tl.where(free, grad_eta, 0.0)
    at_alpha = tl.zeros([C], tl.float32)
    if RETAIN:
        at_alpha = grad_alpha * tl.sigmoid(-logit)
    return grad_eta * limit * share * (1 - share), at_alpha


@triton.jit
def _system_back(keys, solution, inverse, weights, out, systems, spare, vectors, sums, C: tl.constexpr,
                 D: tl.constexpr, R: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """From the gradient at W_C (`weights`) through `_finish` and `_systems`, for one layer.

    Leaves the gradient at rhs in `out` and that at the keys in the place of the inverse; and in the vectors
    from `sums` on those at η, at the sums of log α up to after and up to before every token, and at the last
    of these sums, token by token. A `wait` is due.
    """
    j = tl.arange(0, C)
    total, end = tl.load(vectors + C + j), tl.load(vectors + 2 * C - 1)
    for first in range(0, C, R):
        i = first + tl.arange(0, R)
        left = tl.exp(end - tl.load(vectors + C + i))[:, None]
        grad = -left * by_turned(tl.load(rows(keys, first, R, D)), weights, D, D, P)
        tl.store(rows(spare, first, R, D), grad)
        tl.store(sums + 3 * C + i, tl.sum(grad * get(solution, first, R, D), 1))
    wait()
    at_total = -tl.load(sums + 3 * C + j)
    for first in range(0, C, R):
        i = first + tl.arange(0, R)
        grad = by(turned(inverse, first, R, C, C), spare, C, D, P)
        tl.store(rows(out, first, R, D), grad)
        gram = by_turned(tl.load(rows(keys, first, R, D)), keys, D, C, P)
        at_eta = -by_turned(grad, solution, D, C, P) * decay(vectors, total, i, j, C)
        at_gram = at_eta * tl.load(vectors + i)[:, None]
        tl.store(rows(systems, first, R, C), at_gram)
        at_decay = at_gram * gram
        at_total -= tl.sum(at_decay, 0)
        tl.store(sums + i, tl.sum(at_eta * gram, 1))
        tl.store(sums + 2 * C + i, tl.sum(at_decay, 1))
    tl.store(sums + C + j, at_total)
    wait()
    for first in range(0, C, R):
        left = tl.exp(end - tl.load(vectors + C + first + tl.arange(0, R)))[:, None]
        grad = by(tl.load(rows(systems, first, R, C)), keys, C, D, P)
        grad += by(turned(systems, first, R, C, C), keys, C, D, P)
        grad -= left * by(tl.load(rows(solution, first, R, D)), weights, D, D, P)
        tl.store(rows(inverse, first, R, D), grad)


@triton.jit
def _add(at, value):
    """Add to a tile in memory that shares no numbers with others; a `wait` is due before they are read."""
    value += tl.load(at)
    wait()
    tl.store(at, value)


@triton.jit
def _write_back(base, vectors, w2, w1, grad_w2, grad_w1, grad_k, grad_v, m, C: tl.constexpr,
                D: tl.constexpr, S: tl.constexpr, R: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr,
                OWN: tl.constexpr, STOP: tl.constexpr):  # fmt: skip
    """Through the write of a chunk, after `solve`: gradients at its keys and values `[C, D]`, at the weights
    of its start (in the place of those at its end), and (returned) at the last sum of log α.

    Those at η and the sums of log α are left in vectors 3 to 6 and 7 to 10, see `_system_back`, and through
    the right-hand sides, at η and at the sums up to before every token, in 11 and 12.
    """
    end = tl.exp(tl.load(vectors + 2 * C - 1))
    skip = tl.where(m < FULL, 1.0, 0.0)
    own = tl.where(m < FULL, 1.0 * OWN, 1.0)
    passed = 1.0
    if STOP:
        passed = 0.0
    _system_back(base, base + 8 * S, base + 10 * S, grad_w2, base + 14 * S, base + 12 * S, base + 13 * S,
                 vectors, vectors + 3 * C, C, D, R, P)  # fmt: skip
    _system_back(base + 3 * S, base + 9 * S, base + 11 * S, grad_w1, base + 15 * S, base + 12 * S,
                 base + 13 * S, vectors, vectors + 7 * C, C, D, R, P)  # fmt: skip
    wait()
    few: tl.constexpr = R // 2 if R > 16 else R  # rows: of these, many tiles are held at a time
    for first in range(0, C, few):
        i = first + tl.arange(0, few)
        eta, kept = tl.load(vectors + i)[:, None], tl.exp(tl.load(vectors + 2 * C + i))[:, None]
        z = get(base + 2 * S, first, few, D)
        error = get(base + 5 * S, first, few, D)
        answer = get(base + 6 * S, first, few, D)
        at_hidden = get(base + 7 * S, first, few, D)
        grad_2 = get(base + 14 * S, first, few, D)
        grad_1 = get(base + 15 * S, first, few, D)
        wait()  # their places are written below; other rows are not read
        # through both right-hand sides, as far as the error of the hidden layer
        gate, s, r, u = hidden(z)
        slope = gate + s * (1 - gate)
        tangent = r * (at_hidden - u * tl.sum(u * at_hidden, 1)[:, None])
        at_eta = tl.sum(grad_2 * (slope * tangent + kept * z), 1)
        at_before = tl.sum(eta * kept * grad_2 * z, 1)
        toward = eta * grad_2 * slope
        at_error_hidden = r * (toward - u * tl.sum(u * toward, 1)[:, None])
        tl.store(rows(base + 13 * S, first, few, D), at_error_hidden)
        tl.store(vectors + 11 * C + i, at_eta + tl.sum(grad_1 * (error + kept * answer), 1))
        tl.store(vectors + 12 * C + i, at_before + tl.sum(eta * kept * grad_1 * answer, 1))
        # at the errors and the answers
        at_error = eta * grad_1 + by_turned(at_error_hidden, w1, D, D, P)
        at_answer = eta * kept * grad_1 + at_error
        tl.store(rows(base + 6 * S, first, few, D), at_answer)
        tl.store(rows(base + 15 * S, first, few, D), at_error)
        # at the hidden layer
        at_u = by(at_answer, w1, D, D, P) + get(base + 11 * S, first, few, D)
        at_z = eta * kept * grad_2 + hidden_and_error_back(z, at_hidden, eta * grad_2, at_u)
        tl.store(rows(base + 14 * S, first, few, D), at_z)
        at_k = skip * at_error + by(at_z, w2, D, D, P) + get(base + 10 * S, first, few, D)
        tl.store(rows(grad_k, first, few, D), at_k)
        # at the values, through the targets
        at_u = -passed * own * by(at_error, w1, D, D, P)
        at_z = hidden_back(by_turned(get(base + S, first, few, D), w2, D, D, P), at_u)
        tl.store(rows(base + 7 * S, first, few, D), at_z)
        tl.store(rows(grad_v, first, few, D), by(at_z, w2, D, D, P) - passed * skip * at_error)
    wait()
    return _weights_back(base, w2, w1, grad_w2, grad_w1, end, passed * own, C, D, S, R, P)


@triton.jit
def _weights_back(base, w2, w1, grad_w2, grad_w1, end, targets, C: tl.constexpr, D: tl.constexpr,
                  S: tl.constexpr, R: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """The gradients at the weights of the start, from those at the end and what `_write_back` left, and
    (returned) that at the last sum of log α. `targets`: the share of a gradient that goes through targets."""
    at_end = 0.0
    for first in range(0, D, R):
        grad_2 = end * tl.load(rows(grad_w2, first, R, D))
        wait()  # no other rows are read
        at_end += tl.sum(tl.sum(grad_2 * tl.load(rows(w2, first, R, D)), 1), 0)
        grad_2 += by(turned(base + 14 * S, first, R, D, C), base, C, D, P)
        grad_2 += by(turned(base + 7 * S, first, R, D, C), base + S, C, D, P)
        tl.store(rows(grad_w2, first, R, D), grad_2)
        grad_1 = end * tl.load(rows(grad_w1, first, R, D))
        wait()
        at_end += tl.sum(tl.sum(grad_1 * tl.load(rows(w1, first, R, D)), 1), 0)
        grad_1 += by(turned(base + 5 * S, first, R, D, C), base + 13 * S, C, D, P)
        grad_1 += by(turned(base + 6 * S, first, R, D, C), base + 3 * S, C, D, P)
        grad_1 -= targets * by(turned(base + 15 * S, first, R, D, C), base + 4 * S, C, D, P)
        tl.store(rows(grad_w1, first, R, D), grad_1)
    wait()
    return at_end


@triton.jit
def _answer_back(x, seen, w2, w1, grad_y, grad_q, grad_w2, grad_w1, base, n, N, T, at, M: tl.constexpr,
                 C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
                 IQ: tl.constexpr):  # fmt: skip
    """Through y = q + M(q): the gradient at q `[C, D]`, and what it adds to those at the weights."""
    given = grad_y + (n * T + at) * D
    for first in range(0, C, R):
        q = joined(x, seen, n, IQ, 2, N, T, at, first, M, C, D, R)
        if IQ >= 0:
            q, _ = unit(q)
        tl.store(rows(base, first, R, D), q)
        z = by_turned(q, w2, D, D, P)
        _, _, _, u = hidden(z)
        tl.store(rows(base + S, first, R, D), u)
        grad = tl.load(rows(given, first, R, D))
        at_z = hidden_back(z, by(grad, w1, D, D, P))
        tl.store(rows(base + 2 * S, first, R, D), at_z)
        tl.store(rows(grad_q, first, R, D), grad + by(at_z, w2, D, D, P))
    wait()
    for first in range(0, D, R):
        _add(rows(grad_w2, first, R, D), by(turned(base + 2 * S, first, R, D, C), base, C, D, P))
        _add(rows(grad_w1, first, R, D), by(turned(given, first, R, D, C), base + S, C, D, P))


@triton.jit
def _sums(parts, n, first, M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Rows of the sum over memories of `parts [N, M, C, D]`."""
    total = tl.zeros([R, D], tl.float32)
    for i in range(0, M):
        total += tl.load(rows(parts + (n * M + i) * C * D, first, R, D))
    return total


@triton.jit
def _rate_sums(parts, n, which: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """Sum over memories of `parts [N, M, 2, C]` at η (0) or log α (1)."""
    total = tl.zeros([C], tl.float32)
    for i in range(0, M):
        total += tl.load(parts + ((n * M + i) * 2 + which) * C + tl.arange(0, C))
    return total


@triton.jit
def _stream_back(x, seen, parts, n, m: tl.constexpr, role: tl.constexpr, N, T, at, first, M: tl.constexpr,
                 C: tl.constexpr, D: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """Rows of the gradient at a stream and at what memory m adds to it,
    from the `parts` of the memories at keys,
    values or queries (of which there are those of one memory only)."""
    if role == 2:  # noqa: SIM108  a constant: only one of the two is compiled
        grad = tl.load(rows(parts + n * C * D, first, R, D))
    else:
        grad = _sums(parts, n, first, M, C, D, R)
    if m >= 0 and role != 1:
        grad = _unit_back(joined(x, seen, n, m, role, N, T, at, first, M, C, D, R), grad)
    return grad


@triton.jit
def _project_back(x, rates, seen, w2, w1, parts_k, parts_v, parts_q, parts_r, grad_w2, grad_w1, grad_x,
                  grad_rates, grad_source, base, n, m, N, T, at, limit, M: tl.constexpr, C: tl.constexpr,
                  D: tl.constexpr, S: tl.constexpr, R: tl.constexpr, P: tl.constexpr, IK: tl.constexpr,
                  IV: tl.constexpr, IQ: tl.constexpr, IE: tl.constexpr, IA: tl.constexpr,
                  RETAIN: tl.constexpr, CONTROL: tl.constexpr):  # fmt: skip
    """From the gradients that all memories left at keys, values, queries and rates of the chunk: those at the
    streams and slow logits (by memory 0), and through the projection that memory m makes."""
    at_eta, at_alpha = _rates_back(
        rates, seen, n, N, T, at, limit, _rate_sums(parts_r, n, 0, M, C), _rate_sums(parts_r, n, 1, M, C), M,
        C, D,
        IE, IA, RETAIN, CONTROL,
    )  # fmt: skip
    t = tl.arange(0, C)
    if m == 0:
        tl.store(grad_rates + n * T + at + t, at_eta)
        tl.store(grad_rates + (N + n) * T + at + t, at_alpha)
        for first in range(0, C, R):
            place = (n * T + at) * D
            grad = _stream_back(x, seen, parts_k, n, IK, 0, N, T, at, first, M, C, D, R)
            tl.store(rows(grad_x + place, first, R, D), grad)
            grad = _stream_back(x, seen, parts_v, n, IV, 1, N, T, at, first, M, C, D, R)
            tl.store(rows(grad_x + N * T * D + place, first, R, D), grad)
            grad = _stream_back(x, seen, parts_q, n, IQ, 2, N, T, at, first, M, C, D, R)
            tl.store(rows(grad_x + 2 * N * T * D + place, first, R, D), grad)
    else:
        for first in range(0, C, R):
            grad = tl.zeros([R, D], tl.float32)
            if m == IK:
                grad = _stream_back(x, seen, parts_k, n, IK, 0, N, T, at, first, M, C, D, R)
            if m == IV:
                grad = _stream_back(x, seen, parts_v, n, IV, 1, N, T, at, first, M, C, D, R)
            if m == IQ:
                grad = _stream_back(x, seen, parts_q, n, IQ, 2, N, T, at, first, M, C, D, R)
            tl.store(rows(base, first, R, D), grad)
        wait()
        if m == IE:
            tl.store(base + t * D, at_eta)
        if m == IA:
            tl.store(base + t * D, at_alpha)
        wait()
        source = x + (role_of(m, IV, IQ) * N + n) * T * D + at * D
        for first in range(0, C, R):
            z = by_turned(tl.load(rows(source, first, R, D)), w2, D, D, P)
            _, _, _, u = hidden(z)
            tl.store(rows(base + S, first, R, D), u)
            at_z = hidden_back(z, by(tl.load(rows(base, first, R, D)), w1, D, D, P))
            tl.store(rows(base + 2 * S, first, R, D), at_z)
            tl.store(rows(grad_source + ((n * M + m) * T + at) * D, first, R, D), by(at_z, w2, D, D, P))
        wait()
        for first in range(0, D, R):
            _add(rows(grad_w2, first, R, D), by(turned(base + 2 * S, first, R, D, C), source, C, D, P))
            _add(rows(grad_w1, first, R, D), by(turned(base, first, R, D, C), base + S, C, D, P))


@triton.jit(do_not_specialize=VARYING)
def backward(x, rates, seen, seen_next, w2, w1, w2_next, w1_next, grad_y, grad_w2, grad_w1, grad_x,
             grad_rates, grad_source, parts_k, parts_v, parts_q, parts_r, left_k, left_v, left_q, left_r,
             scratch, vectors, N, T, at, limit, steps, write, project, M: tl.constexpr, C: tl.constexpr,
             D: tl.constexpr, S: tl.constexpr, LOG: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
             FULL: tl.constexpr, SLOW: tl.constexpr, IK: tl.constexpr, IV: tl.constexpr, IQ: tl.constexpr,
             IE: tl.constexpr, IA: tl.constexpr, OWN: tl.constexpr, STOP: tl.constexpr,
             RETAIN: tl.constexpr, CONTROL: tl.constexpr):  # fmt: skip
    """Through the projection of the chunk after the one at token `at`, if `project`, then through the write
    of this one, if `write` (else the former is that of this one). Both are 0 or 1.

    Arguments as `forward`; those that end in `_next`, and `left_`, are of the chunk after. grad_w2, grad_w1
    `[N, M, D, D]`: at the weights after this chunk, then at those before it. grad_source `[N, M, T, D]`: at
    the streams, through what memories project. parts_k, parts_v `[N, M, C, D]`, parts_q `[N, C, D]`, parts_r
    `[N, M, 2, C]`: what this launch leaves to the next one.
    """
    program = tl.program_id(0).to(tl.int64)
    n, m = program // M, program % M
    base, vectors = scratch + program * SLOTS * S, vectors + program * VECTORS * C
    grad_w2, grad_w1 = grad_w2 + program * D * D, grad_w1 + program * D * D
    if project:
        after = at + write * C
        _project_back(x, rates, seen_next, w2_next + program * D * D, w1_next + program * D * D, left_k,
                      left_v, left_q, left_r, grad_w2, grad_w1, grad_x, grad_rates, grad_source, base, n,
                      m, N, T, after, limit, M, C, D, S, R, P, IK, IV, IQ, IE, IA, RETAIN,
                      CONTROL)  # fmt: skip
    if write:
        own_w2, own_w1 = w2 + program * D * D, w1 + program * D * D
        factor = tl.where(m < SLOW, 1.0, steps)
        solve(x, rates, seen, own_w2, own_w1, base, vectors, n, m, N, T, at, limit, factor, True, M, C, D,
              S, LOG, R, P, FULL, IK, IV, IE, IA, OWN, RETAIN, CONTROL)  # fmt: skip
        at_end = _write_back(base, vectors, own_w2, own_w1, grad_w2, grad_w1, parts_k + program * C * D,
                             parts_v + program * C * D, m, C, D, S, R, P, FULL, OWN, STOP)  # fmt: skip
        v = vectors + tl.arange(0, C)
        before = tl.load(v + 5 * C) + tl.load(v + 9 * C) + tl.load(v + 12 * C)
        at_total = tl.load(v + 4 * C) + tl.load(v + 8 * C) + before
        at_end += tl.sum(tl.load(v + 6 * C) + tl.load(v + 10 * C), 0)
        at_alpha = tl.sum(at_total, 0) - tl.cumsum(at_total, 0) + at_total + at_end - before
        at_eta = tl.load(v + 3 * C) + tl.load(v + 7 * C) + tl.load(v + 11 * C)
        at_rates = parts_r + program * 2 * C + tl.arange(0, C)
        tl.store(at_rates, factor * at_eta)
        tl.store(at_rates + C, at_alpha)
        if m == 0:
            _answer_back(x, seen, own_w2, own_w1, grad_y, parts_q + n * C * D, grad_w2, grad_w1, base, n,
                         N, T, at, M, C, D, S, R, P, IQ)  # fmt: skip
