"""The Triton kernels that write the memories of a fast level over one chunk; see `triton.py`.

A chunk takes four launches, because each needs what all programs of the one before have made:

    hidden_layer       z = W₂k, u = σ̂(z)                               rows of the chunk, all of h
    answers            e₁ = W₁u − v̂, and the inverse of W₁'s system    columns of o, all of the chunk
    hidden_errors      e₂ = σ̂'(z)ᵀ W₁ᵀ e₁                              rows of the chunk, all of h
    update             W₂ and W₁ after the chunk                       tiles of both

Letters are those of `../memory_mlp/README.md`; N sequences of J chunks. Of tensors of all chunks `[J, N, …]`
a launch takes number `chunk`; those of one chunk, `[N, …]`, are scratch.
Constants: C tokens of a chunk; D, H, O widths of input, hidden layer and output; HP the power of two from H
on; P precision of products. At a time: R rows that are whole, otherwise T tokens; K summands, B columns and
BR rows of the width; KH, BH and HR those of the hidden layer. No tile here has 64 rows: from there on Triton
takes products that only Hopper has, and the known mistakes of its versions with small tiles are among these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nested_learning.ops.tiles import dot, hidden, hidden_back, invert_unit_lower, wait

VARYING = ("N", "chunk")
"""Arguments whose values do not ask for a compilation of their own."""


@triton.jit
def tile(matrix, row, column, stride: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """Addresses of R rows and B columns of a matrix with rows of `stride` numbers."""
    return matrix + (row + tl.arange(0, R))[:, None] * stride + (column + tl.arange(0, B))[None, :]


@triton.jit
def turned_tile(matrix, row, column, stride: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """The same, transposed: `[B, R]`."""
    return matrix + (column + tl.arange(0, B))[:, None] + (row + tl.arange(0, R))[None, :] * stride


@triton.jit
def whole_rows(matrix, row, H: tl.constexpr, HP: tl.constexpr, R: tl.constexpr):
    """R rows `[R, HP]` of a matrix with H columns, and zeros."""
    inside = (tl.arange(0, HP) < H)[None, :]
    return tl.load(tile(matrix, row, 0, H, R, HP), mask=inside, other=0.0)


@triton.jit
def store_whole_rows(matrix, row, value, H: tl.constexpr, HP: tl.constexpr, R: tl.constexpr):
    """Write the first H columns of `value [R, HP]` to R rows of a matrix."""
    inside = (tl.arange(0, HP) < H)[None, :]
    tl.store(tile(matrix, row, 0, H, R, HP), value, mask=inside)


@triton.jit
def vector(values, row, R: tl.constexpr):
    """R numbers as a column `[R, 1]`."""
    return tl.load(values + row + tl.arange(0, R))[:, None]


@triton.jit(do_not_specialize=VARYING)
def hidden_layer(keys, w2, z, u, N, chunk, C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
                 HP: tl.constexpr, R: tl.constexpr, K: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """z = W₂k and u = σ̂(z) for R tokens: keys `[J, N, C, D]`, w2 `[J + 1, N, H, D]`; z, u `[N, C, H]`."""
    n = tl.program_id(1).to(tl.int64)
    first, at = tl.program_id(0) * R, chunk * N + n
    inside = (tl.arange(0, HP) < H)[None, :]
    total = tl.zeros([R, HP], tl.float32)
    for k in range(0, D, K):
        right = tl.load(turned_tile(w2 + at * H * D, 0, k, D, HP, K), mask=inside, other=0.0)
        total = dot(tl.load(tile(keys + at * C * D, first, k, D, R, K)), right, total, P)
    _, _, _, at_hidden = hidden(total)
    store_whole_rows(z + n * C * H, first, total, H, HP, R)
    store_whole_rows(u + n * C * H, first, at_hidden, H, HP, R)


@triton.jit(do_not_specialize=VARYING)
def answers(u, values, w1, erasing, eta, kept, error, rhs, strict, inverse, N, chunk, C: tl.constexpr,
            H: tl.constexpr, O: tl.constexpr, LOG: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
            KH: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Tiles of e₁ = W₁u − v̂ and of the right-hand sides η (e₁ + a⁻₀ W₁u); one more program inverts.

    values `[J, N, C, O]`, w1 `[J + 1, N, O, H]`, erasing `[J, N, C, C]`, eta and kept (a⁻₀) `[J, N, C]`;
    error, rhs `[N, C, O]`; strict and inverse `[N, C, C]`: N = diag(η)(a⁻ ∘ UUᵀ) and (I + N)⁻¹.
    """
    n = tl.program_id(1).to(tl.int64)
    part, at = tl.program_id(0), chunk * N + n
    u, strict, inverse = u + n * C * H, strict + n * C * C, inverse + n * C * C
    if part < C // T * (O // B):
        row, column = part // (O // B) * T, part % (O // B) * B
        answer = tl.zeros([T, B], tl.float32)
        for k in range(0, H, KH):
            right = tl.load(turned_tile(w1 + at * O * H, column, k, H, B, KH))
            answer = dot(tl.load(tile(u, row, k, H, T, KH)), right, answer, P)
        differs = answer - tl.load(tile(values + at * C * O, row, column, O, T, B))
        scaled = vector(eta + at * C, row, T) * (differs + vector(kept + at * C, row, T) * answer)
        tl.store(tile(error + n * C * O, row, column, O, T, B), differs)
        tl.store(tile(rhs + n * C * O, row, column, O, T, B), scaled)
    else:
        _system(u, erasing + at * C * C, strict, C, H, T, KH, P)
        invert_unit_lower(strict, inverse, 1, C * C, C, LOG, "tf32" if P == "bf16" else P)


@triton.jit
def _system(keys, erasing, strict, C: tl.constexpr, H: tl.constexpr, T: tl.constexpr, KH: tl.constexpr,
            P: tl.constexpr):  # fmt: skip
    """diag(η)(a⁻ ∘ KKᵀ), strictly lower triangular."""
    for row in range(0, C, T):
        gram = tl.zeros([T, C], tl.float32)
        for k in range(0, H, KH):
            right = tl.load(turned_tile(keys, 0, k, H, C, KH))
            gram = dot(tl.load(tile(keys, row, k, H, T, KH)), right, gram, P)
        tl.store(tile(strict, row, 0, C, T, C), gram * tl.load(tile(erasing, row, 0, C, T, C)))
    wait()


@triton.jit(do_not_specialize=VARYING)
def hidden_errors(z, error, w1, kept, rhs, N, chunk, C: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
                  O: tl.constexpr, R: tl.constexpr, K: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Right-hand sides e₂ + a⁻₀ z of R tokens, without the η that W₂'s solver has: rhs `[N, C, H]`."""
    n = tl.program_id(1).to(tl.int64)
    first, at = tl.program_id(0) * R, chunk * N + n
    inside = (tl.arange(0, HP) < H)[None, :]
    total = tl.zeros([R, HP], tl.float32)
    for k in range(0, O, K):
        right = tl.load(tile(w1 + at * O * H, k, 0, H, K, HP), mask=inside, other=0.0)
        total = dot(tl.load(tile(error + n * C * O, first, k, O, R, K)), right, total, P)
    seen = whole_rows(z + n * C * H, first, H, HP, R)
    value = hidden_back(seen, total) + vector(kept + at * C, first, R) * seen
    store_whole_rows(rhs + n * C * H, first, value, H, HP, R)


@triton.jit
def _after(weights, now, then, rhs, solver, keys, left, whole, row, column, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
           P: tl.constexpr):  # fmt: skip
    """A tile of W_C = a₀ W₀ − (a ∘ U)ᵀ K with Uᵀ = rhsᵀ solverᵀ, for T tokens at a time."""
    change = tl.zeros([BR, BC], tl.float32)
    for t in range(0, C, T):
        right = tl.load(turned_tile(solver, t, 0, C, T, C))
        solved = dot(tl.load(turned_tile(rhs, 0, row, ROWS, C, BR)), right, tl.zeros([BR, T], tl.float32), P)
        solved *= tl.load(left + t + tl.arange(0, T))[None, :]
        change = dot(solved, tl.load(tile(keys, t, column, COLUMNS, T, BC)), change, P)
    size: tl.constexpr = ROWS * COLUMNS
    before = tl.load(tile(weights + now * size, row, column, COLUMNS, BR, BC))
    tl.store(tile(weights + then * size, row, column, COLUMNS, BR, BC), whole * before - change)


@triton.jit(do_not_specialize=VARYING)
def update(keys, u, solver, inverse, rhs_2, rhs_1, left, whole, w2, w1, N, chunk, C: tl.constexpr,
           D: tl.constexpr, H: tl.constexpr, O: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
           BR: tl.constexpr, BH: tl.constexpr, HR: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Tiles of both layers after the chunk, first those of W₂.

    left `[J, N, C]`: a from after every token to the end; whole `[J, N]`: a over the chunk.
    """
    n = tl.program_id(1).to(tl.int64)
    part, at = tl.program_id(0), chunk * N + n
    decayed = tl.load(whole + at)
    left += at * C
    if part < H // HR * (D // B):
        _after(w2, at, at + N, rhs_2 + n * C * H, solver + at * C * C, keys + at * C * D, left, decayed,
               part // (D // B) * HR, part % (D // B) * B, H, D, HR, B, C, T, P)  # fmt: skip
    else:
        part -= H // HR * (D // B)
        _after(w1, at, at + N, rhs_1 + n * C * O, inverse + n * C * C, u + n * C * H, left, decayed,
               part // (H // BH) * BR, part % (H // BH) * BH, O, H, BR, BH, C, T, P)  # fmt: skip
