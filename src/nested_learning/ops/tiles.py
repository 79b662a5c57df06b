"""Device functions of our Triton kernels: products, vectors and triangular inverses of matrices in memory.

One program works on matrices that do not all fit its registers. They lie row by row in scratch memory, which
is close enough (in the cache) and which all threads of the program see; a tile of their rows is in registers
as long as it takes. `put` waits for all threads before and after it writes, so that nothing is read too late
or too early.

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
def get(matrix, first, R: tl.constexpr, S: tl.constexpr):
    """R rows of a matrix in memory from number `first`, in float32."""
    return tl.load(rows(matrix, first, R, S)).to(tl.float32)


@triton.jit
def dot(a, b, total, P: tl.constexpr):
    """`total` + A B, in precision P: "bf16" rounds both factors first, others are `tl.dot`'s."""
    if P == "bf16":
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        total = tl.dot(a, b, total, input_precision=P)
    return total


@triton.jit
def by(a, b, K: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """Rows `a [R, K]` times B `[K, N]` in memory."""
    right = tl.load(b + tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :])
    return dot(a, right, tl.zeros([a.shape[0], N], tl.float32), P)


@triton.jit
def by_turned(a, b, K: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """Rows `a [R, K]` times Bᵀ, for B `[N, K]` in memory."""
    right = tl.load(b + tl.arange(0, K)[:, None] + tl.arange(0, N)[None, :] * K)
    return dot(a, right, tl.zeros([a.shape[0], N], tl.float32), P)


@triton.jit
def turned(a, first, R: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    """Rows of Aᵀ from number `first`, `[R, K]`, for A `[K, M]` in memory."""
    return tl.load(a + (first + tl.arange(0, R))[:, None] + tl.arange(0, K)[None, :] * M)


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
def hidden_and_error_back(z, g, grad, at_u):
    """Gradient at z of u = σ̂(z) and e₂ = σ̂'(z)ᵀ g, from those at u (`at_u`) and e₂ (`grad`)."""
    gate, s, r, u = hidden(z)
    toward = (gate + s * (1 - gate)) * grad  # through silu'(z)
    along = tl.sum(u * g, 1)[:, None]
    across = g - u * along  # e₂ = silu'(z) ∘ r across
    at_u -= r * (toward * along + g * tl.sum(u * toward, 1)[:, None])
    at_r = tl.sum(toward * across + s * at_u, 1)[:, None]
    curved = (1 - gate) * (2 * gate + s * (1 - 2 * gate))  # silu''(z)
    return r * ((gate + s * (1 - gate)) * (at_u - r * u * at_r) + curved * across * grad)


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + e^−x)), also where that is near 0."""
    y = tl.exp(-tl.abs(x))
    whole = 1 + y
    tail = tl.where(whole == 1, y, tl.log(whole) * (y / tl.where(whole == 1, 1.0, whole - 1)))  # log(1 + y)
    return tl.minimum(x, 0.0) - tail


@triton.jit
def invert_unit_lower(strict, inverse, C: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr,
                      P: tl.constexpr):  # fmt: skip
    """(I + N)⁻¹ into `inverse [C, C]`, for strictly lower triangular N at `strict [C, C]`, C = 2^LOG.

    By halves, as `ops/triangular/inverse.py`: blocks of 2^BLOCK in registers, larger ones in memory.
    """
    size: tl.constexpr = 1 << BLOCK
    i, j = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    if size < C:
        for first in range(0, C, size):
            put(rows(inverse, first, size, C), tl.zeros([size, C], tl.float32))
    for first in range(0, C, size):
        n = tl.load(strict + (first + i) * C + first + j).to(tl.float32)
        x = tl.where(i == j, 1.0, 0.0) - tl.where((i >> 1) == (j >> 1), n, 0.0)  # blocks of 2
        for level in tl.static_range(1, BLOCK):
            below = ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) != (j >> level))
            corner = tl.dot(tl.where(below, n, 0.0), x, input_precision=P)
            x -= tl.dot(x, corner, input_precision=P)
        put(inverse + (first + i) * C + first + j, x)
    for level in tl.static_range(BLOCK, LOG):
        _join(strict, inverse, 1 << level, C, P)


@triton.jit
def _join(strict, inverse, H: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """From the inverses of all diagonal blocks of size H to those of size 2 H."""
    i, j = tl.arange(0, H)[:, None], tl.arange(0, H)[None, :]
    for first in range(0, C, 2 * H):
        corner = (first + H) * C + first
        upper, lower = inverse + first * C + first, inverse + (first + H) * C + first + H
        place = corner + i * C + j
        first_half = tl.load(strict + place).to(tl.float32)
        first_half = tl.dot(first_half, tl.load(upper + i * C + j).to(tl.float32), input_precision=P)
        put(
            inverse + place, -tl.dot(tl.load(lower + i * C + j).to(tl.float32), first_half, input_precision=P)
        )
