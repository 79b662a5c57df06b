"""The gated delta rule over a whole sequence: batched products for all chunks at once, and one Triton kernel.

Within a chunk the write is that of `chunk.py` without momentum, with errors −v, from W₀ at the chunk's start:

    (I + N) D = diag(η) (V − a⁻₀ ∘ K W₀ᵀ),   N = diag(η)(a⁻ ∘ KKᵀ),   D = −U: what each token writes
    W_C = a₀ W₀ + Dᵀ(a ∘ K),                  y = a₀ ∘ Q W₀ᵀ + (a ∘ QKᵀ) D

D is affine in W₀. With B = (I + N)⁻¹ diag(η) V and P = −(I + N)⁻¹ diag(η)(a⁻₀ ∘ K), D = B + P W₀ᵀ, so

    W_C = W₀ (a₀ I + R) + A,   R = Pᵀ(a ∘ K) [d, d],   A = Bᵀ(a ∘ K) [o, d]

R and A do not depend on W₀. So B, P, R and A of all chunks are computed at once (`prepare`), then W at every
chunk's start, one product per chunk, in one kernel (`_States`), then all answers at once (`answer`). The adjoint
of the middle part is the same recurrence backwards with Rᵀ, hence the same kernel. The number of kernels
does not depend on the number of chunks.

Shapes: `N` sequences and heads, `M` chunks, `C` tokens of a chunk, `d` input width, `o` output width. Everything
is computed in float32; only products may use TF32, where PyTorch's own may.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops.delta_rule import naive
from nested_learning.ops.delta_rule.chunk import LinearMemory, LinearPiece, Rates, make_rates
from nested_learning.ops.kernels import Kernel
from nested_learning.ops.triangular import solve_unit_lower
from nested_learning.ops.unit import l2_normalize

MAX_WIDTH = 128
MIN_CHUNK = 16
"""W at every chunk's start is kept: with shorter chunks that is more than the keys and values."""
ROWS = 16  # of W in one program: the fewest that a tensor core takes, for the most programs
TILE = 64  # columns of W in one product at most: wider ones would not fit the registers of two warps
WARPS = 2


def supports(objective: str, read: str, delta: bool, at: LinearMemory, chunk_size: int) -> bool:
    """Whether the kernel has this rule: the arguments of `chunk.read_and_write`, and the chunk in tokens."""
    rule = objective == "dot" and read == "after_write" and delta
    plain = at.momentum is None and at.initial is None and at.weights.dtype == torch.float32
    return rule and plain and max(at.weights.shape[-2:]) <= MAX_WIDTH and chunk_size >= MIN_CHUNK


def read_and_write(chunk_size: int, at: LinearMemory, piece: LinearPiece) -> tuple[Tensor, LinearMemory]:
    """Answers `[N, T, o]` in float32 to a sequence of any length, and the memory after it.

    The rule must be one that `supports` accepts; gradients, also second ones, reach everything.
    """
    count = piece.k.shape[-2]
    chunks = cut(piece, chunk_size)
    ready = prepare(chunks)
    added = torch.cat([at.weights.float().unsqueeze(1), ready.added], 1)
    states = _States.apply(ready.rates.a.start[..., -1], ready.turn, added, False)  # type: ignore[no-untyped-call]
    starts, last = states.split([ready.turn.shape[1], 1], 1)
    return answer(ready, chunks, starts).flatten(1, 2)[:, :count], LinearMemory(last.squeeze(1))


def cut(piece: LinearPiece, size: int) -> LinearPiece:
    """The tokens as `[N, M, C, …]` in float32; the last chunk is filled with tokens that write and forget nothing."""
    spare = -piece.k.shape[-2] % size

    def chunks(x: Tensor, after: int) -> Tensor:
        padded = F.pad(x.float(), (0, 0) * after + (0, spare)) if spare else x.float()
        return padded.unflatten(1, (-1, size))

    vectors = (chunks(x, 1) for x in (piece.q, piece.k, piece.v))
    return LinearPiece(*vectors, chunks(piece.eta, 0), chunks(piece.log_alpha, 0), None)


class Prepared(NamedTuple):
    """What the chunks do to any W, see the module."""

    rates: Rates
    written: Tensor  # B [N, M, C, o]
    seen: Tensor  # P [N, M, C, d]
    turn: Tensor  # R [N, M, d, d]
    added: Tensor  # A [N, M, o, d]


def prepare(tokens: LinearPiece) -> Prepared:
    """Everything of all chunks that does not depend on W."""
    k, v, eta = tokens.k, tokens.v, tokens.eta[..., None]
    rates = make_rates(tokens.eta, tokens.log_alpha)
    before = rates.a.before(1.0)
    rhs = eta * torch.cat([v, -before.start[..., None] * k], -1)
    solved = solve_unit_lower(eta * before.inside * (k @ k.mT), rhs)
    written, seen = solved.split([v.shape[-1], k.shape[-1]], -1)
    kept = rates.a.inside[..., -1, :, None] * k
    return Prepared(rates, written, seen, seen.mT @ kept, written.mT @ kept)


def answer(ready: Prepared, tokens: LinearPiece, starts: Tensor) -> Tensor:
    """Answers `[N, M, C, o]` from W at the chunks' starts `[N, M, o, d]`."""
    a, old = ready.rates.a, starts.mT
    added = ready.written + ready.seen @ old
    inside = a.inside * (tokens.q @ tokens.k.mT)
    return (a.start[..., None] * tokens.q) @ old + inside @ added


class _States(torch.autograd.Function):
    """X₀ = A₀, X_{m+1} = X_m (a_m I + R_m) + A_{m+1} for m = 0 … M − 1; or, `backwards`, its adjoint
    X_M = A_M, X_m = X_{m+1}(a_m I + R_m)ᵀ + A_m.

    Takes a `[N, M]`, R `[N, M, d, d]`, A `[N, M + 1, o, d]`; returns X as A.
    """

    @staticmethod
    def forward(ctx: Any, keep: Tensor, turn: Tensor, added: Tensor, backwards: bool) -> Tensor:
        keep, turn = keep.contiguous(), turn.contiguous()
        states = launch(keep, turn, added.contiguous(), backwards)
        ctx.save_for_backward(keep, turn, states)
        ctx.backwards = backwards
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        keep, turn, states = ctx.saved_tensors
        adjoint: Tensor = _States.apply(keep, turn, grad, not ctx.backwards)  # type: ignore[no-untyped-call]
        first, second = (adjoint, states) if ctx.backwards else (states, adjoint)
        grad_turn = first[:, :-1].mT @ second[:, 1:]
        grad_keep = grad_turn.diagonal(dim1=-2, dim2=-1).sum(-1)  # a multiplies the diagonal of that matrix
        return grad_keep, grad_turn, adjoint, None


def launch(keep: Tensor, turn: Tensor, added: Tensor, backwards: bool) -> Tensor:
    """`_States` by the kernel; all tensors are contiguous and in float32."""
    count, chunks, width, _ = turn.shape
    rows = added.shape[-2]
    states = torch.empty_like(added)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    grid = (count * triton.cdiv(rows, ROWS),)
    with torch.cuda.device_of(added):  # Triton starts kernels on the current device, whatever their tensors say
        scan_states[grid](
            states, added, turn, keep, chunks, **constants(rows, width, backwards, precision), num_warps=WARPS, num_stages=1
        )
    return states


def constants(rows: int, width: int, backwards: bool, precision: str) -> dict[str, Any]:
    """The constants of `scan_states` for W `[rows, width]`."""
    tile = min(TILE, max(16, triton.next_power_of_2(width)))
    return {
        "rows": rows,
        "width": width,
        "ROWS": ROWS,
        "TILE": tile,
        "TWO": width > tile,
        "BACKWARDS": backwards,
        "PRECISION": precision,
    }


@triton.jit
def _load(matrix, row, column, rows: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entries of a row-major `[rows, width]`; 0 outside of it."""
    inside = (row < rows) & (column < width)
    return tl.load(matrix + row * width + column, mask=inside, other=0.0)


@triton.jit
def _store(matrix, row, column, rows: tl.constexpr, width: tl.constexpr, value):  # type: ignore[no-untyped-def]
    tl.store(matrix + row * width + column, value, mask=(row < rows) & (column < width))


@triton.jit
def _turn(matrix, inner, outer, width: tl.constexpr, BACKWARDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of R `[width, width]`, or of Rᵀ. Read transposed, as no `tl.trans` has to be right then."""
    if BACKWARDS:
        tile = _load(matrix, outer[None, :], inner[:, None], width, width)
    else:
        tile = _load(matrix, inner[:, None], outer[None, :], width, width)
    return tile


@triton.jit(do_not_specialize=["chunks"])
def scan_states(  # type: ignore[no-untyped-def]
    states,
    added,
    turn,
    keep,
    chunks,
    rows: tl.constexpr,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TWO: tl.constexpr,
    BACKWARDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`ROWS` rows of X for one of the N, over all chunks: see `_States`.

    The rows stay in registers, in one tile of columns or in two. a X is added in float32, whatever the
    precision of the product: else W would be rounded once per chunk.
    """
    blocks: tl.constexpr = (rows + ROWS - 1) // ROWS
    number = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS))[:, None]
    low = tl.arange(0, TILE)
    high = TILE + low
    first = tl.where(BACKWARDS, chunks, 0)
    states += (number * (chunks + 1) + first) * (rows * width)
    added += (number * (chunks + 1) + first) * (rows * width)
    turn += (number * chunks + tl.where(BACKWARDS, chunks - 1, 0)) * (width * width)
    keep += number * chunks + tl.where(BACKWARDS, chunks - 1, 0)
    step: tl.constexpr = -1 if BACKWARDS else 1

    x = _load(added, row, low[None, :], rows, width)
    _store(states, row, low[None, :], rows, width, x)
    if TWO:
        z = _load(added, row, high[None, :], rows, width)
        _store(states, row, high[None, :], rows, width, z)
    for _ in range(chunks):
        states += step * rows * width
        added += step * rows * width
        a = tl.load(keep)
        new = a * x + _load(added, row, low[None, :], rows, width)
        new += tl.dot(x, _turn(turn, low, low, width, BACKWARDS), input_precision=PRECISION)
        if TWO:
            new += tl.dot(z, _turn(turn, high, low, width, BACKWARDS), input_precision=PRECISION)
            last = a * z + _load(added, row, high[None, :], rows, width)
            last += tl.dot(x, _turn(turn, low, high, width, BACKWARDS), input_precision=PRECISION)
            last += tl.dot(z, _turn(turn, high, high, width, BACKWARDS), input_precision=PRECISION)
            z = last
            _store(states, row, high[None, :], rows, width, z)
        x = new
        _store(states, row, low[None, :], rows, width, x)
        turn += step * width * width
        keep += step
