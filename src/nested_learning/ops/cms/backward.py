"""The Triton kernels that take gradients through the write of one chunk of a fast level; see `triton.py`.

From the gradients at the weights after the chunk to those before it, in four launches:

    through_update     at both right-hand sides, and at u through W₁'s keys
    through_errors     at e₁ and the answers, and at the system of W₁
    through_hidden     at z
    start_gradients    at the weights

What depends on no gradient is computed for all chunks at once before the first launch, and what no weight
waits for (gradients at keys, values and rates) after the last. Letters and constants as in `forward.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nested_learning.ops.cms.forward import (
    VARYING,
    store_whole_rows,
    tile,
    turned_tile,
    vector,
    whole_rows,
)
from nested_learning.ops.tiles import dot, hidden_and_error_back


@triton.jit
def _through_solver(keys, grad, solver, left, out, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    B: tl.constexpr, K: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
                    P: tl.constexpr):  # fmt: skip
    """B columns of solverᵀ Q with Q = −a ∘ (K Gᵀ), for the gradient G `[ROWS, COLUMNS]` at W_C."""
    total = tl.zeros([B, C], tl.float32)
    for k in range(0, COLUMNS, K):
        right = tl.load(turned_tile(keys, 0, k, COLUMNS, C, K))
        total = dot(tl.load(tile(grad, row, k, COLUMNS, B, K)), right, total, P)
    total *= -tl.load(left + tl.arange(0, C))[None, :]
    for t in range(0, C, T):
        found = dot(total, tl.load(tile(solver, 0, t, C, C, T)), tl.zeros([B, T], tl.float32), P)
        tl.store(turned_tile(out, t, row, ROWS, T, B), found)


@triton.jit(do_not_specialize=VARYING)
def through_update(keys, u, solver, inverse, left, scaled, grad_2, grad_1, at_rhs_2, at_rhs_1, at_u, N, chunk,
                   C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, O: tl.constexpr,
                   R: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, HR: tl.constexpr, K: tl.constexpr,
                   KH: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Columns of the gradients at the right-hand sides (of W₁'s before its η), then rows of −(a ∘ U₁) G₁.

    scaled: a ∘ U₁ `[J, N, C, O]`. grad_2, grad_1 `[J + 1, N, …]`: complete for the weights after the chunk.
    at_rhs_2 `[J, N, C, H]`, at_rhs_1 `[J, N, C, O]`, at_u `[N, C, H]`.
    """
    n = tl.program_id(1).to(tl.int64)
    part, at = tl.program_id(0), chunk * N + n
    grad_2, grad_1, left = grad_2 + (at + N) * H * D, grad_1 + (at + N) * O * H, left + at * C
    if part < H // HR:
        _through_solver(keys + at * C * D, grad_2, solver + at * C * C, left, at_rhs_2 + at * C * H,
                        part * HR, H, D, HR, K, C, T, P)  # fmt: skip
    elif part < H // HR + O // BR:
        _through_solver(u + at * C * H, grad_1, inverse + at * C * C, left, at_rhs_1 + at * C * O,
                        (part - H // HR) * BR, O, H, BR, KH, C, T, P)  # fmt: skip
    else:
        first = (part - H // HR - O // BR) * R
        inside = (tl.arange(0, HP) < H)[None, :]
        total = tl.zeros([R, HP], tl.float32)
        for k in range(0, O, K):
            right = tl.load(tile(grad_1, k, 0, H, K, HP), mask=inside, other=0.0)
            total = dot(tl.load(tile(scaled + at * C * O, first, k, O, R, K)), right, total, P)
        store_whole_rows(at_u + n * C * H, first, -total, H, HP, R)


@triton.jit(do_not_specialize=VARYING)
def through_errors(u, slope, norm, solved, erasing, eta, kept, w1, at_rhs_2, at_rhs_1, at_error, at_answer,
                   at_hidden, systems, N, chunk, C: tl.constexpr, H: tl.constexpr, O: tl.constexpr,
                   T: tl.constexpr, B: tl.constexpr, K: tl.constexpr, KH: tl.constexpr,
                   P: tl.constexpr):  # fmt: skip
    """Tiles of the gradients at e₁ and at W₁u; then rows of that at a⁻ ∘ UUᵀ.

    slope: silu'(z) `[J, N, C, H]`, norm: r `[J, N, C]`, solved: U₁ `[J, N, C, O]`. at_error `[J, N, C, O]`;
    at_answer `[N, C, O]`; at_hidden `[N, C, H]`: at W₁ᵀe₁; systems `[N, C, C]`.
    """
    n = tl.program_id(1).to(tl.int64)
    part, at = tl.program_id(0), chunk * N + n
    at_rhs_1 += at * C * O
    if part < C // T * (O // B):
        row, column = part // (O // B) * T, part % (O // B) * B
        total = _at_errors(u + at * C * H, slope + at * C * H, norm + at * C, at_rhs_2 + at * C * H,
                           w1 + at * O * H, at_hidden + n * C * H, row, column, H, T, B, KH, P)  # fmt: skip
        direct = vector(eta + at * C, row, T) * tl.load(tile(at_rhs_1, row, column, O, T, B))
        tl.store(tile(at_error + at * C * O, row, column, O, T, B), total + direct)
        direct += vector(kept + at * C, row, T) * direct
        tl.store(tile(at_answer + n * C * O, row, column, O, T, B), total + direct)
    else:
        first = (part - C // T * (O // B)) * T
        at_system = tl.zeros([T, C], tl.float32)
        for k in range(0, O, K):
            right = tl.load(turned_tile(solved + at * C * O, 0, k, O, C, K))
            at_system = dot(tl.load(tile(at_rhs_1, first, k, O, T, K)), right, at_system, P)
        at_system *= -tl.load(tile(erasing + at * C * C, first, 0, C, T, C))  # strictly lower triangular
        tl.store(tile(systems + n * C * C, first, 0, C, T, C), at_system)


@triton.jit
def _at_errors(u, slope, norm, at_rhs_2, w1, at_hidden, row, column, H: tl.constexpr, T: tl.constexpr,
               B: tl.constexpr, KH: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """A tile of the gradient at e₁ through W₁ᵀe₁; the first column of tiles leaves that at W₁ᵀe₁."""
    along = tl.zeros([T, 1], tl.float32)
    for k in range(0, H, KH):
        toward = tl.load(tile(at_rhs_2, row, k, H, T, KH)) * tl.load(tile(slope, row, k, H, T, KH))
        along += tl.sum(toward * tl.load(tile(u, row, k, H, T, KH)), 1)[:, None]
    total = tl.zeros([T, B], tl.float32)
    for k in range(0, H, KH):
        toward = tl.load(tile(at_rhs_2, row, k, H, T, KH)) * tl.load(tile(slope, row, k, H, T, KH))
        toward = vector(norm, row, T) * (toward - along * tl.load(tile(u, row, k, H, T, KH)))
        total = dot(toward, tl.load(turned_tile(w1, column, k, H, B, KH)), total, P)
        if column == 0:
            tl.store(tile(at_hidden, row, k, H, T, KH), toward)
    return total


@triton.jit(do_not_specialize=VARYING)
def through_hidden(z, u, hidden_error, at_rhs_2, at_u, at_answer, systems, kept, w1, at_z, N, chunk,
                   C: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, O: tl.constexpr, R: tl.constexpr,
                   K: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Rows of the gradient at z: through W₁u, UUᵀ, and the right-hand side e₂ + a⁻₀ z.

    hidden_error: W₁ᵀe₁ `[J, N, C, H]`; at_z `[J, N, C, H]`.
    """
    n = tl.program_id(1).to(tl.int64)
    first, at = tl.program_id(0) * R, chunk * N + n
    inside = (tl.arange(0, HP) < H)[None, :]
    total = whole_rows(at_u + n * C * H, first, H, HP, R)
    for k in range(0, O, K):
        right = tl.load(tile(w1 + at * O * H, k, 0, H, K, HP), mask=inside, other=0.0)
        total = dot(tl.load(tile(at_answer + n * C * O, first, k, O, R, K)), right, total, P)
    systems = systems + n * C * C
    for k in range(0, C, R):
        both = tl.load(tile(systems, first, k, C, R, R)) + tl.load(turned_tile(systems, k, first, C, R, R))
        total = dot(both, whole_rows(u + at * C * H, k, H, HP, R), total, P)
    given = whole_rows(at_rhs_2 + at * C * H, first, H, HP, R)
    seen = whole_rows(z + at * C * H, first, H, HP, R)
    found = hidden_and_error_back(seen, whole_rows(hidden_error + at * C * H, first, H, HP, R), given, total)
    found += vector(kept + at * C, first, R) * given
    store_whole_rows(at_z + at * C * H, first, found, H, HP, R)


@triton.jit(do_not_specialize=VARYING)
def start_gradients(keys, u, at_z, error, at_hidden, at_answer, whole, grad_2, grad_1, N, chunk,
                    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, O: tl.constexpr, T: tl.constexpr,
                    B: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, HR: tl.constexpr,
                    P: tl.constexpr):  # fmt: skip
    """Add to tiles of the gradients at the weights of the chunk's start what reaches them by its write."""
    n = tl.program_id(1).to(tl.int64)
    part, at = tl.program_id(0), chunk * N + n
    decayed = tl.load(whole + at)
    if part < H // HR * (D // B):
        row, column = part // (D // B) * HR, part % (D // B) * B
        change = _outer(at_z + at * C * H, keys + at * C * D, tl.zeros([HR, B], tl.float32), row, column, H,
                        D, HR, B, C, T, P)  # fmt: skip
        _carry(grad_2 + at * H * D, grad_2 + (at + N) * H * D, decayed, change, row, column, D, HR, B)
    else:
        part -= H // HR * (D // B)
        row, column = part // (H // BH) * BR, part % (H // BH) * BH
        sums = _outer(error + at * C * O, at_hidden + n * C * H, tl.zeros([BR, BH], tl.float32), row, column,
                      O, H, BR, BH, C, T, P)  # fmt: skip
        sums = _outer(at_answer + n * C * O, u + at * C * H, sums, row, column, O, H, BR, BH, C, T, P)
        _carry(grad_1 + at * O * H, grad_1 + (at + N) * O * H, decayed, sums, row, column, H, BR, BH)


@triton.jit
def _outer(a, b, total, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr,
           BC: tl.constexpr, C: tl.constexpr, T: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """`total` plus a tile of Aᵀ B, for A `[C, ROWS]` and B `[C, COLUMNS]`."""
    for t in range(0, C, T):
        left = tl.load(turned_tile(a, t, row, ROWS, T, BR))
        total = dot(left, tl.load(tile(b, t, column, COLUMNS, T, BC)), total, P)
    return total


@triton.jit
def _carry(grad, after, decayed, change, row, column, COLUMNS: tl.constexpr, BR: tl.constexpr,
           BC: tl.constexpr):  # fmt: skip
    """Add `change` to a tile of a gradient, and what reaches it from the weights after the chunk."""
    place = tile(grad, row, column, COLUMNS, BR, BC)
    carried = decayed * tl.load(tile(after, row, column, COLUMNS, BR, BC))
    tl.store(place, tl.load(place) + carried + change)
