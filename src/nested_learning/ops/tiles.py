"""Device functions of our Triton kernels: products, vectors and triangular inverses of matrices in memory.

One program works on matrices that do not fit its registers. They lie row by row in scratch memory, which is
close enough (in the cache) and which all threads of the program see; a product reads slices of them, and only
its sum is in registers. `put` waits for all threads before and after it writes, so that nothing is read too
late or too early.

Shapes: matrices have S columns; a tile is R rows of one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def put(at, value):
    """Write a tile or a vector to the addresses `at`: all have read what was there, and all see it now."""
    tl.debug_barrier()
    tl.store(at, value)
    tl.debug_barrier()


@triton.jit
def rows(matrix, first, R: tl.constexpr, S: tl.constexpr):
    """Addresses of the R rows of `matrix [.., S]` from number `first`."""
    return matrix + (first + tl.arange(0, R))[:, None] * S + tl.arange(0, S)[None, :]


@triton.jit
def product(
    a, a_row, a_column, b, b_row, b_column,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, B: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A `[M, K]` times B `[K, N]`, from memory with any strides, B columns of A at a time, in precision P."""
    i, j = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros([M, N], tl.float32)
    for first in range(0, K, B):
        k = first + tl.arange(0, B)
        left = tl.load(a + i * a_row + k[None, :] * a_column)
        right = tl.load(b + k[:, None] * b_row + j * b_column)
        total = tl.dot(left, right, total, input_precision=P)
    return total


@triton.jit
def times(a, b, first, R: tl.constexpr, K: tl.constexpr, N: tl.constexpr, B: tl.constexpr, P: tl.constexpr):
    """Rows of A B from number `first`, for A `[.., K]` and B `[K, N]`."""
    return product(a + first * K, K, 1, b, N, 1, R, N, K, B, P)


@triton.jit
def times_turned(
    a, b, first, R: tl.constexpr, K: tl.constexpr, N: tl.constexpr, B: tl.constexpr, P: tl.constexpr
):
    """Rows of A Bᵀ from number `first`, for A `[.., K]` and B `[N, K]`."""
    return product(a + first * K, K, 1, b, 1, K, R, N, K, B, P)


@triton.jit
def turned_times(
    a, b, first, R: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, B: tl.constexpr,
    P: tl.constexpr
):  # fmt: skip
    """Rows of Aᵀ B from number `first`, for A `[K, M]` and B `[K, N]`."""
    return product(a + first, 1, M, b, N, 1, R, N, K, B, P)


@triton.jit
def hidden(z):
    """σ̂(z) = s r with s = silu(z), r = (‖s‖² + 1)^(−1/2): the sigmoid, s, r `[R, 1]` and s r."""
    gate = tl.sigmoid(z)
    s = z * gate
    r = tl.rsqrt(tl.sum(s * s, 1) + 1.0)[:, None]
    return gate, s, r, s * r


@triton.jit
def hidden_back(z, grad):
    """Gradient at z, from that at σ̂(z)."""
    gate, s, r, u = hidden(z)
    at_s = r * (grad - u * tl.sum(u * grad, 1)[:, None])
    return (gate + s * (1 - gate)) * at_s


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + e^−x)), also where that is near 0."""
    y = tl.exp(-tl.abs(x))
    whole = 1 + y
    tail = tl.where(whole == 1, y, tl.log(whole) * (y / tl.where(whole == 1, 1.0, whole - 1)))  # log(1 + y)
    return tl.minimum(x, 0.0) - tail


@triton.jit
def invert_unit_lower(strict, inverse, C: tl.constexpr, LOG: tl.constexpr, P: tl.constexpr):
    """(I + N)⁻¹ into `inverse [C, C]`, for strictly lower triangular N at `strict [C, C]`, C = 2^LOG ≥ 16.

    By halves, as `ops/triangular.py`. Overwrites N.
    """
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    for first in range(0, C, 16):
        put(rows(inverse, first, 16, C), tl.zeros([16, C], tl.float32))
    for first in range(0, C, 16):
        n = tl.load(strict + (first + i) * C + first + j)
        x = tl.where(i == j, 1.0, 0.0) - tl.where((i >> 1) == (j >> 1), n, 0.0)  # blocks of 2
        for level in tl.static_range(1, 4):
            below = ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) != (j >> level))
            corner = tl.dot(tl.where(below, n, 0.0), x, input_precision=P)
            x -= tl.dot(x, corner, input_precision=P)
        put(inverse + (first + i) * C + first + j, x)
    for level in tl.static_range(4, LOG):
        _join(strict, inverse, 1 << level, C, P)


@triton.jit
def _join(strict, inverse, H: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """From the inverses of all diagonal blocks of size H to those of size 2 H."""
    i, j = tl.arange(0, H)[:, None], tl.arange(0, H)[None, :]
    for first in range(0, C, 2 * H):
        corner = (first + H) * C + first
        half = product(strict + corner, C, 1, inverse + first * C + first, C, 1, H, H, H, 16, P)
        put(strict + corner + i * C + j, half)
        lower = inverse + (first + H) * C + first + H
        below = product(lower, C, 1, strict + corner, C, 1, H, H, H, 16, P)
        put(inverse + corner + i * C + j, -below)
