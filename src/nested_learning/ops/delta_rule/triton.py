"""The gated delta rule over a whole sequence: batched products for all chunks at once, and one Triton kernel.

Within a chunk the write is that of `chunk.py` without momentum, with errors −v, from W₀ at the chunk's start:

    (I + N) D = diag(η) (V − a⁻₀ ∘ K W₀ᵀ),   N = diag(η)(a⁻ ∘ KKᵀ),   D = −U: what each token writes
    W_C = a₀ W₀ + Dᵀ(a ∘ K),                  y = a₀ ∘ Q W₀ᵀ + (a ∘ QKᵀ) D

D is affine in W₀. With B = (I + N)⁻¹ diag(η) V and P = −(I + N)⁻¹ diag(η)(a⁻₀ ∘ K), D = B + P W₀ᵀ, so

    W_C = W₀ (a₀ I + R) + A,   R = Pᵀ(a ∘ K) [d, d],   A = Bᵀ(a ∘ K) [o, d]

R and A do not depend on W₀. So B, P, R and A of all chunks are computed at once (`prepare`), then W at every
chunk's start, one product per chunk, in one kernel (`_States`), then all answers at once (`answer`). The
adjoint of the middle part is the same recurrence backwards with Rᵀ, hence the same kernel. The number of
kernels does not depend on the number of chunks.

Shapes: `N` sequences and heads, `M` chunks, `C` tokens of a chunk, `d` input width, `o` output width.
Everything is computed in float32; only products may use TF32, where PyTorch's own may.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops import kernels
from nested_learning.ops.delta_rule import naive
from nested_learning.ops.delta_rule.chunk import LinearMemory, LinearPiece, Rates, make_rates
from nested_learning.ops.delta_rule.chunk import prepare as prepare_write
from nested_learning.ops.kernels import Kernel, precision
from nested_learning.ops.unit import l2_normalize

MAX_WIDTH = 128
MIN_CHUNK = 16
"""W at every chunk's start is kept: with shorter chunks that is more than the keys and values."""
ROWS = 16  # of W in one program: the fewest that a tensor core takes, for the most programs (and no wgmma)
DEPTH = 32  # columns of W in one product at most: more would not fit the registers


def supports(objective: str, read: str, delta: bool, at: LinearMemory, chunk_size: int) -> bool:
    """Whether the kernel has this rule: the arguments of `chunk.read_and_write`, and the chunk in tokens."""
    rule = objective == "dot" and read == "after_write" and delta
    plain = at.momentum is None and at.initial is None and at.weights.dtype == torch.float32
    return rule and plain and max(at.weights.shape[-2:]) <= MAX_WIDTH and chunk_size >= MIN_CHUNK


@torch.compiler.disable
def read_and_write(chunk_size: int, at: LinearMemory, piece: LinearPiece) -> tuple[Tensor, LinearMemory]:
    """Answers `[N, T, o]` in float32 to a sequence of any length, and the memory after it.

    The rule must be one that `supports` accepts; gradients, also second ones, reach everything.
    """
    count = piece.k.shape[-2]
    chunks = cut(piece, chunk_size)
    ready = prepare(chunks)
    added = torch.cat([at.weights.float().unsqueeze(1), ready.added], 1)
    states = _States.apply(ready.rates.a.whole, ready.turn, added, False)  # type: ignore[no-untyped-call]
    starts, last = torch.split(states, [ready.turn.shape[1], 1], 1)
    y = answer(ready, chunks, starts).flatten(1, 2)[:, :count]
    return y, LinearMemory(last.squeeze(1).clone())  # a view would keep W of all chunks in memory


def cut(piece: LinearPiece, size: int) -> LinearPiece:
    """The tokens as `[N, M, C, …]` in float32; those that fill the last chunk write and forget nothing."""
    spare = -piece.k.shape[-2] % size

    def chunks(x: Tensor) -> Tensor:
        wide = x.float()
        if spare:
            wide = F.pad(wide, (0, 0) * (x.dim() - 2) + (0, spare))
        return wide.reshape(len(x), -1, size, *x.shape[2:])

    q, k, v, eta, log_alpha = map(chunks, (piece.q, piece.k, piece.v, piece.eta, piece.log_alpha))
    return LinearPiece(q, k, v, eta, log_alpha, None)


class Prepared(NamedTuple):
    """What the chunks do to any W, see the module."""

    rates: Rates
    written: Tensor  # B [N, M, C, o]
    seen: Tensor  # P [N, M, C, d]
    turn: Tensor  # R [N, M, d, d]
    added: Tensor  # A [N, M, o, d]


def prepare(tokens: LinearPiece) -> Prepared:
    """Everything of all chunks that does not depend on W."""
    k, v = tokens.k, tokens.v
    rates = make_rates(tokens.eta, tokens.log_alpha)
    rhs = torch.cat([v, -rates.a_before.start[..., None] * k], -1)
    solver = prepare_write(rates, k).solver
    assert solver is not None
    written, seen = torch.split(solver @ rhs, [v.shape[-1], k.shape[-1]], -1)
    kept = rates.a.end[..., None] * k
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
    grid = (count * triton.cdiv(rows, ROWS),)
    # Triton starts a kernel on the current device, whatever the device of its tensors.
    with torch.cuda.device_of(added):  # type: ignore[no-untyped-call]
        fixed = constants(rows, width, backwards, precision())
        scan_states[grid](states, added, turn, keep, chunks, **fixed, num_warps=warps(width), num_stages=1)
    return states


def warps(width: int) -> int:
    """Warps of a program: as few as hold its rows of W in their registers."""
    return 2 if width <= 64 else 4


def constants(rows: int, width: int, backwards: bool, products: str) -> dict[str, Any]:
    """The constants of `scan_states` for W `[rows, width]`."""
    return {
        "rows": rows,
        "width": width,
        "ROWS": ROWS,
        "TILE": max(16, triton.next_power_of_2(width)),
        "DEPTH": DEPTH,
        "BACKWARDS": backwards,
        "PRECISION": products,
    }


@triton.jit
def _load(matrix, row, column, rows: tl.constexpr, width: tl.constexpr):
    """Entries of a row-major `[rows, width]`; 0 outside of it."""
    inside = (row < rows) & (column < width)
    return tl.load(matrix + row * width + column, mask=inside, other=0.0)


@triton.jit
def _store(matrix, row, column, rows: tl.constexpr, width: tl.constexpr, value):
    tl.store(matrix + row * width + column, value, mask=(row < rows) & (column < width))


@triton.jit
def _halves(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The left and the right columns of `x [ROWS, 2·HALF]`."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, HALF]), [0, 2, 1]))


@triton.jit
def _add_product(
    sums,
    x,
    turn,
    start: tl.constexpr,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    DEPTH: tl.constexpr,
    BACKWARDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`sums [ROWS, TILE]` + x R, or x Rᵀ, for the columns `x [ROWS, COUNT]` of X from `start` on."""
    if COUNT > DEPTH:
        HALF: tl.constexpr = COUNT // 2
        left, right = _halves(x, ROWS, HALF)
        sums = _add_product(sums, left, turn, start, width, ROWS, TILE, HALF, DEPTH, BACKWARDS, PRECISION)
        sums = _add_product(
            sums, right, turn, start + HALF, width, ROWS, TILE, HALF, DEPTH, BACKWARDS, PRECISION
        )
    else:
        inner = start + tl.arange(0, COUNT)
        outer = tl.arange(0, TILE)
        if BACKWARDS:
            tile = _load(turn, outer[None, :], inner[:, None], width, width)
        else:
            tile = _load(turn, inner[:, None], outer[None, :], width, width)
        sums += tl.dot(x, tile, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=["chunks"])
def scan_states(
    states,
    added,
    turn,
    keep,
    chunks,
    rows: tl.constexpr,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    BACKWARDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`ROWS` rows of X for one of the N, over all chunks: see `_States`.

    The rows stay in registers. a X is added in float32, whatever the precision of the product: else W would
    be rounded once per chunk.
    """
    blocks: tl.constexpr = (rows + ROWS - 1) // ROWS
    number = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, TILE)[None, :]
    states += number * (chunks + 1) * (rows * width)
    added += number * (chunks + 1) * (rows * width)
    turn += number * chunks * (width * width)
    keep += number * chunks
    step: tl.constexpr = -1 if BACKWARDS else 1
    if BACKWARDS:
        last = chunks.to(tl.int64)
        states += last * (rows * width)
        added += last * (rows * width)
        turn += (last - 1) * (width * width)
        keep += last - 1

    x = _load(added, row, column, rows, width)
    _store(states, row, column, rows, width, x)
    for _ in range(chunks):
        states += step * rows * width
        added += step * rows * width
        new = tl.load(keep) * x + _load(added, row, column, rows, width)
        x = _add_product(new, x, turn, 0, width, ROWS, TILE, TILE, DEPTH, BACKWARDS, PRECISION)
        _store(states, row, column, rows, width, x)
        turn += step * width * width
        keep += step


RESULTS = ("answers", "last weights", "queries", "keys", "values", "eta", "log_alpha", "first weights")
"""What `compare` compares; from the third on, the gradients at these inputs."""
SIZES = ((16, 16), (64, 64), (128, 32))
"""Head widths and chunks that `compare` tries."""


def compare(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference from the token loop in float64, relative to the largest entry, by name and width.

    Args:
        device: where both run.
        dtype: of queries, keys, values and rates, and so of their gradients; W is in float32.
    """
    found = {}
    for width, chunk in SIZES:
        for name, value in differences(width, chunk, device, dtype).items():
            found[f"{name}, width {width}"] = value
    return found


def right(width: int, chunk: int, device: torch.device) -> bool:
    """Whether the kernel of heads and chunks of these sizes is right there, see `ops/kernels.py: right`."""
    key = ("delta_rule", width, chunk, device)
    return kernels.right(key, precision(), lambda: differences(width, chunk, device, torch.float32))


def differences(width: int, chunk: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Those of one size, by name."""
    inputs = sample(width, 2 * chunk + 5, device, dtype)  # the last chunk is not full
    wanted = _results([t.double() for t in inputs], chunk)
    return kernels.relative(RESULTS, _results(inputs, chunk), wanted)


def sample(width: int, length: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Random inputs in the order of `RESULTS`, of two sequences; every other token forgets nothing."""
    generator = torch.Generator().manual_seed(width)
    q, k, v = torch.randn(3, 2, length, width, generator=generator)
    eta, alpha = torch.rand(2, 2, length, generator=generator)
    log_alpha = (0.8 + 0.2 * alpha).log() * (torch.arange(length) % 2)
    weights = torch.randn(2, width, width, generator=generator) / width**0.5
    tokens = (l2_normalize(q), l2_normalize(k), v, eta, log_alpha)
    return [*(t.to(device, dtype) for t in tokens), weights.to(device)]


def _results(inputs: list[Tensor], chunk: int) -> list[Tensor]:
    """`RESULTS` of the kernel, or in float64 of the token loop, with gradients of a random projection."""
    q, k, v, eta, log_alpha, weights = leaves = [t.detach().requires_grad_() for t in inputs]
    if weights.dtype == torch.float64:
        rates = (eta, log_alpha.exp(), None)
        y, last, _ = naive.delta_rule(
            q, k, v, rates, weights, chunk_size=chunk, objective="dot", read="after_write"
        )
    else:
        tokens = LinearPiece(q, k, v, eta, log_alpha, None)
        y, (last, _, _) = read_and_write(chunk, LinearMemory(weights), tokens)
    generator = torch.Generator().manual_seed(0)
    probes = [torch.randn(t.shape, generator=generator).to(t) for t in (y, last)]
    return [y.detach(), last.detach(), *torch.autograd.grad([y, last], leaves, probes)]


KERNEL = Kernel("delta_rule", compare)
