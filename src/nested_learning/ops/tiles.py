"""Device functions of our Triton kernels: products, vectors and triangular inverses of matrices in memory.

One program works on matrices that do not all fit its registers. They lie row by row in scratch memory, which
is close enough (in the cache) and which all threads of the program see; a tile of their rows is in registers
as long as it takes. Which thread holds which numbers differs from tile to tile: between a write and a read of
the same place, and between a read and the next write, stands a `wait`.

Shapes: matrices have S columns; a tile is R rows of one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait():
    """All threads come here before one goes on: what stands before is read and written by then."""
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
def invert_unit_lower(strict, inverse, B: tl.constexpr, S: tl.constexpr, C: tl.constexpr, LOG: tl.constexpr,
                      P: tl.constexpr):  # fmt: skip
    """(I + N)⁻¹ into `inverse`, for strictly lower triangular N at `strict`: B matrices `[C, C]` each, S
    numbers apart, C = 2^LOG. All threads must see N; they see the inverses.

    By halves, as `ops/triangular/inverse.py`, all diagonal blocks of a size at once: those of 16 rows in
    registers, larger ones from the next smaller in memory.
    """
    _invert_blocks(strict, inverse, B, S, C, P)
    for level in tl.static_range(4, LOG):
        wait()
        if level < 6:
            _join(strict, inverse, 1 << level, B, S, C, P)
        else:  # too much to hold all in registers
            _join_in_turn(strict, inverse, 1 << level, B, S, C, P)
    wait()


@triton.jit
def _invert_blocks(strict, inverse, B: tl.constexpr, S: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """Inverses of all diagonal blocks of 16 rows."""
    block = tl.arange(0, B * C // 16)[:, None, None]
    i, j = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    place = block // (C // 16) * S + block % (C // 16) * (16 * C + 16) + i * C + j
    n = tl.load(strict + place).to(tl.float32)
    x = tl.where(i == j, 1.0, 0.0) - tl.where((i >> 1) == (j >> 1), n, 0.0)  # blocks of 2
    for level in tl.static_range(1, 4):
        below = ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) != (j >> level))
        corner = tl.dot(tl.where(below, n, 0.0), x, input_precision=P)
        x -= tl.dot(x, corner, input_precision=P)
    tl.store(inverse + place, x)


@triton.jit
def _join(strict, inverse, H: tl.constexpr, B: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
          P: tl.constexpr):  # fmt: skip
    """From the inverses of all diagonal blocks of size H to those of size 2 H: beside two of them, X and Y,
    lies −Y N X below the diagonal and 0 above it.

    16 columns of all these at once, which do not need the others.
    """
    parts: tl.constexpr = H // 16
    pairs: tl.constexpr = C // (2 * H)
    number = tl.arange(0, B * pairs * parts)[:, None, None]
    part, pair, matrix = number % parts, number // parts % pairs, number // (parts * pairs)
    upper = matrix * S + pair * (2 * H * C + 2 * H)
    row, column = tl.arange(0, H)[None, :, None], tl.arange(0, H)[None, None, :]
    few = part * 16 + tl.arange(0, 16)[None, None, :]
    n = tl.load(strict + upper + (H + row) * C + column).to(tl.float32)
    x = tl.load(inverse + upper + row * C + few).to(tl.float32)
    y = tl.load(inverse + upper + (H + row) * C + H + column).to(tl.float32)
    below = tl.dot(y, tl.dot(n, x, input_precision=P), input_precision=P)
    tl.store(inverse + upper + (H + row) * C + few, -below)
    tl.store(inverse + upper + row * C + H + few, tl.zeros_like(below))


@triton.jit
def _join_in_turn(strict, inverse, H: tl.constexpr, B: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
                  P: tl.constexpr):  # fmt: skip
    """`_join` one pair of blocks after the other, with all of their columns."""
    block = tl.arange(0, H)[:, None] * C + tl.arange(0, H)[None, :]
    pairs: tl.constexpr = C // (2 * H)
    for number in range(0, B * pairs):
        upper = number // pairs * S + number % pairs * (2 * H * C + 2 * H)
        n = tl.load(strict + upper + H * C + block).to(tl.float32)
        product = tl.dot(n, tl.load(inverse + upper + block).to(tl.float32), input_precision=P)
        y = tl.load(inverse + upper + H * C + H + block).to(tl.float32)
        below = tl.dot(y, product, input_precision=P)
        tl.store(inverse + upper + H * C + block, -below)
        tl.store(inverse + upper + H + block, tl.zeros_like(below))
