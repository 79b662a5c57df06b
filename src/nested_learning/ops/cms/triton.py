"""A fast level over whole chunks, with four Triton launches per chunk and direction.

The equations are those of `chunk.py`. Only the write is a recurrence, so that only the write has kernels
(`forward.py`, `backward.py`): they leave the memories at the start of every chunk. Queries are answered for
all chunks at once, and so is what of the backward pass depends on no gradient at a memory. A memory is too
large for one multiprocessor: a launch cuts a step into tiles; a chunk takes a launch for each of its steps.

Shapes: `N` sequences, `J` chunks of `C` tokens, `D` model width, `H` hidden width. Tensors of all chunks are
`[J, N, …]`. States, gradients and sums are in float32, products in the precision of `ops/kernels.py:
products_on`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nested_learning.ops import kernels
from nested_learning.ops.cms.backward import start_gradients, through_errors, through_hidden, through_update
from nested_learning.ops.cms.chunk import LevelProgress
from nested_learning.ops.cms.forward import answers, hidden_errors, hidden_layer, update
from nested_learning.ops.kernels import Kernel, precision
from nested_learning.ops.memory_mlp.chunk import (
    Memories,
    Stack,
    WriteRule,
    WriteTokens,
    finish,
    forward,
    hidden,
    read,
    write,
)
from nested_learning.ops.segments import segments
from nested_learning.ops.triangular.inverse import inverse_unit_lower
from nested_learning.ops.unit import l2_normalize

SIZES = (16, 32, 64, 128)
"""Chunks in tokens that the kernels take."""
STEP = 16
"""Widths are multiples of it."""
WIDEST = 512
"""Hidden layer: one program holds whole rows of it."""
AT_ONCE = 64
"""Chunks whose weights are held together where no gradient is asked for."""
WHOLE_ROWS = (hidden_layer, hidden_errors, through_hidden)
"""Kernels that hold rows of the hidden layer as wide as they are."""
STAGES = 2
"""Of the loads in a loop over summands."""

Tokens = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys `[J, N, C, D]`, targets `[J, N, C, D]`, η and log α `[J, N, C]`."""
Weights = tuple[Tensor, Tensor]
"""W₂ `[…, H, D]` and W₁ `[…, D, H]`."""


def supports(rule: WriteRule, memory: Memories, size: int) -> bool:
    """Whether the kernels have this rule, for chunks of `size` tokens."""
    plain = rule.delta and not rule.momentum and not rule.to_initial and rule.error_limit is None
    w2 = memory.weights.w2
    hidden_width, width = w2.shape[-2:]
    sizes = size in SIZES and hidden_width <= WIDEST and hidden_width % STEP == 0 and width % STEP == 0
    return plain and sizes and w2.dtype == torch.float32


@torch.compiler.disable
def read_and_write(
    at: LevelProgress, queries: Tensor, tokens: WriteTokens, size: int, products: str
) -> tuple[Tensor, LevelProgress]:
    """Answers `[N, T, D]` to whole chunks of `size` tokens from a boundary on, and where sequences stand.

    `products`: their precision. The rule must be one that `supports` accepts. Gradients reach everything,
    second ones by `chunk.py`. Without gradients the weights of `AT_ONCE` chunks are held at a time.
    """
    if torch.is_grad_enabled() or queries.shape[1] <= AT_ONCE * size:
        return _read_and_write(at, queries, tokens, size, products)
    answers = []
    runs = segments(queries.shape[1], 0, AT_ONCE * size)
    for asked, written in zip(torch.split(queries, runs, 1), tokens.split(runs), strict=True):
        answer, at = _read_and_write(at, asked, written, size, products)
        answers.append(answer)
    return torch.cat(answers, 1), at


def _read_and_write(
    at: LevelProgress, queries: Tensor, tokens: WriteTokens, size: int, products: str
) -> tuple[Tensor, LevelProgress]:
    weights = at.memory.weights
    k, v, eta, log_alpha = (_by_chunks(t, size) for t in tokens if t is not None)
    w2, w1 = _scan(products, k, v, eta, log_alpha, weights.w2[:, 0], weights.w1[0][:, 0])
    asked = w2[:-1].flatten(0, 1), w1[:-1].flatten(0, 1), _by_chunks(queries, size).flatten(0, 1)
    if torch.is_grad_enabled():  # only what the scan has stored anyway is stored, and no copies in bf16
        answer = checkpoint(_answers, products, *asked, use_reentrant=False, preserve_rng_state=False)
    else:
        answer = _answers(products, *asked)
    answer = answer.view(*k.shape[:3], -1).transpose(0, 1).flatten(1, 2).to(queries.dtype)
    after = at.memory._replace(weights=_stack(w2[-1], w1[-1]))
    return answer, LevelProgress(after, None, at.start)


def _answers(products: str, w2: Tensor, w1: Tensor, queries: Tensor) -> Tensor:
    """`[J·N, C, D]`, to the queries of every chunk by the weights of its start."""
    with torch.autocast(queries.device.type, torch.bfloat16, enabled=products == "bf16"):
        return read(_stack(w2, w1), queries)[0]


def _by_chunks(t: Tensor, size: int) -> Tensor:
    """`[N, J·C, …]` → `[J, N, C, …]`."""
    return t.view(t.shape[0], -1, size, *t.shape[2:]).transpose(0, 1).contiguous()


def _stack(w2: Tensor, w1: Tensor) -> Stack:
    """A stack of one memory for every sequence."""
    return Stack(w2.unsqueeze(1), (w1.unsqueeze(1),))


def _scan(products: str, *inputs: Tensor) -> Weights:
    """Tokens and weights `[N, …]` to weights at all chunks' starts and after the last, `[J + 1, N, …]`."""
    found: Weights = _Scan.apply(products, *inputs)  # type: ignore[no-untyped-call]
    return found


class _Scan(torch.autograd.Function):
    """See `_scan`."""

    @staticmethod
    def forward(ctx: Any, products: str, *inputs: Tensor) -> Weights:
        *tokens, w2, w1 = inputs
        found = Launches(_prepared(*tokens), products).write(w2, w1)
        ctx.products = products
        ctx.save_for_backward(*inputs, *found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, found = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        if torch.is_grad_enabled():  # to be differentiated again
            return None, *_differentiable(inputs, grads)
        with torch.enable_grad():
            tokens = [t.detach().requires_grad_() for t in inputs[:4]]
            ready = _prepared(*tokens)
        at_ready = Launches(ready, ctx.products).back(found, (grads[0].clone(), grads[1].clone()))
        return None, *torch.autograd.grad(ready, tokens, at_ready[:-2]), *at_ready[-2:]


class Ready(NamedTuple):
    """What the write of every chunk needs, and what does not depend on the memory.

    Args:
        keys, values: `[J, N, C, D]`.
        eta: step sizes `[J, N, C]`.
        kept: a⁻₀, from the chunk's start to before every token.
        left: from after every token to the chunk's end.
        whole: a over the chunk `[J, N]`.
        erasing: diag(η) a⁻ `[J, N, C, C]`.
        solver: (I + diag(η)(a⁻ ∘ KKᵀ))⁻¹ diag(η), of W₂.
    """

    keys: Tensor
    values: Tensor
    eta: Tensor
    kept: Tensor
    left: Tensor
    whole: Tensor
    erasing: Tensor
    solver: Tensor


def _prepared(k: Tensor, v: Tensor, eta: Tensor, log_alpha: Tensor) -> Ready:
    """For all chunks at once; see `Tokens`."""
    rates, keys, solver, _ = WriteTokens(k, v, eta, log_alpha).prepare(delta=True)
    assert solver is not None
    a = rates.a
    parts = (keys, v, rates.eta, rates.a_before.start, a.end, a.whole, rates.erasing, solver)
    return Ready(*(t.contiguous() for t in parts))


def _differentiable(inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of `_Scan` at its inputs as functions of them and of `grads`, by `chunk.py`."""
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(by_torch(*inputs), wanted, grads, create_graph=True))
    return tuple(next(found) if t.requires_grad else None for t in inputs)


def by_torch(k: Tensor, v: Tensor, eta: Tensor, log_alpha: Tensor, w2: Tensor, w1: Tensor) -> Weights:
    """What `_Scan` computes, chunk by chunk in PyTorch."""
    rule, memory = WriteRule(), Memories(_stack(w2, w1), None, None)
    stacks = [memory.weights]
    for chunk in zip(k, v, eta, log_alpha, strict=True):
        tokens = WriteTokens(*chunk)
        (at,) = forward(memory.weights, tokens.k)
        memory = finish(write(rule, memory, at, (tokens.v.unsqueeze(1),), tokens.prepare(True)), memory)
        stacks.append(memory.weights)
    return torch.stack([s.w2[:, 0] for s in stacks]), torch.stack([s.w1[0][:, 0] for s in stacks])


class Again(NamedTuple):
    """What the forward pass of all chunks makes of their tokens and weights, each `[J, N, C, …]`."""

    z: Tensor  # and gate, s, r, u: the hidden layer, see `Hidden`
    gate: Tensor
    s: Tensor
    r: Tensor
    u: Tensor
    answers: Tensor  # W₁u
    error: Tensor  # e₁
    hidden_error: Tensor  # W₁ᵀe₁
    rhs_2: Tensor  # e₂ + a⁻₀ z
    gram: Tensor  # UUᵀ
    inverse: Tensor  # of W₁'s system
    solved_2: Tensor
    solved_1: Tensor


class Launches:
    """The launches over all chunks of some sequences."""

    def __init__(self, ready: Ready, products: str) -> None:
        self.ready, self.products = Ready(*(t.detach() for t in ready)), products
        self.chunks, self.count, self.size, self.width = ready.keys.shape

    def write(self, w2: Tensor, w1: Tensor) -> Weights:
        """The weights at the start of every chunk and after the last, from those `[N, …]` of the first."""
        x, hidden_width = self.ready, w2.shape[1]
        all_2, all_1 = (w.new_empty(self.chunks + 1, *w.shape) for w in (w2, w1))
        all_2[0], all_1[0] = w2, w1
        fixed = constants(self.size, self.width, hidden_width, self.products)
        z, u, rhs_2 = self._empty(3, self.size, hidden_width)
        error, rhs_1 = self._empty(2, self.size, self.width)
        strict, inverse = self._empty(2, self.size, self.size)
        rows, tiles = self.size // fixed["R"], _tiles(fixed)
        for chunk in range(self.chunks):
            run = partial(self._launch, fixed, chunk)
            run(hidden_layer, rows, x.keys, all_2, z, u)
            found = error, rhs_1, strict, inverse
            run(answers, tiles.errors + 1, u, x.values, all_1, x.erasing, x.eta, x.kept, *found)
            run(hidden_errors, rows, z, error, all_1, x.kept, rhs_2)
            solved = x.solver, inverse, rhs_2, rhs_1
            run(update, tiles.weights, x.keys, u, *solved, x.left, x.whole, all_2, all_1)
        return all_2, all_1

    def back(self, weights: Weights, grads: Weights) -> tuple[Tensor, ...]:
        """Gradients at `Ready` and at the first weights, from `grads` at all `weights` of `write`, which are
        overwritten."""
        x, (w2, w1), (grad_2, grad_1) = self.ready, weights, grads
        made = self._again(w2[:-1], w1[:-1])
        hidden_width = w2.shape[-2]
        fixed = constants(self.size, self.width, hidden_width, self.products)
        slope = made.gate + made.s * (1 - made.gate)
        scaled = x.left[..., None] * made.solved_1
        at_rhs_2, at_z = torch.empty_like(made.z), torch.empty_like(made.z)
        at_rhs_1, at_error = torch.empty_like(x.values), torch.empty_like(x.values)
        at_u, at_hidden = self._empty(2, self.size, hidden_width)
        (at_answer,), (systems,) = self._empty(1, self.size, self.width), self._empty(1, self.size, self.size)
        rows, tiles = self.size // fixed["R"], _tiles(fixed)
        for chunk in reversed(range(self.chunks)):
            run = partial(self._launch, fixed, chunk)
            given = x.keys, made.u, x.solver, made.inverse, x.left, scaled
            run(through_update, tiles.rows + rows, *given, grad_2, grad_1, at_rhs_2, at_rhs_1, at_u)
            rates = x.erasing, x.eta, x.kept
            found = at_error, at_answer, at_hidden, systems
            number = tiles.errors + self.size // fixed["T"]
            solved = made.u, slope, made.r, made.solved_1
            run(through_errors, number, *solved, *rates, w1, at_rhs_2, at_rhs_1, *found)
            errors = made.hidden_error, at_rhs_2, at_u, at_answer, systems
            run(through_hidden, rows, made.z, made.u, *errors, x.kept, w1, at_z)
            sums = x.keys, made.u, at_z, made.error, at_hidden, at_answer
            run(start_gradients, tiles.weights, *sums, x.whole, grad_2, grad_1)
        return self._rest(weights, grads, made, at_rhs_2, at_rhs_1, at_error, at_z)

    def _again(self, w2: Tensor, w1: Tensor) -> Again:
        """The forward pass of all chunks, from the weights at their starts."""
        x = self.ready
        at = hidden(self._by(x.keys, w2.mT))
        answer = self._by(at.u, w1.mT)
        error = answer - x.values
        hidden_error = self._by(error, w1)
        rhs_2 = at.backward(hidden_error) + x.kept[..., None] * at.z
        rhs_1 = x.eta[..., None] * (error + x.kept[..., None] * answer)
        gram = self._by(at.u, at.u.mT)
        inverse = inverse_unit_lower(x.erasing * gram)
        solved = self._by(x.solver, rhs_2), self._by(inverse, rhs_1)
        found = Again(*at, answer, error, hidden_error, rhs_2, gram, inverse, *solved)
        return Again(*(t.contiguous() for t in found))

    def _rest(
        self,
        weights: Weights,
        grads: Weights,
        made: Again,
        at_rhs_2: Tensor,
        at_rhs_1: Tensor,
        at_error: Tensor,
        at_z: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradients at `Ready`, for all chunks at once, and at the first weights."""
        x, (w2, w1), (after_2, after_1) = self.ready, (w[:-1] for w in weights), (g[1:] for g in grads)
        left = x.left[..., None]
        at_solved_2, at_solved_1 = self._by(x.keys, after_2.mT), self._by(made.u, after_1.mT)  # without −a
        at_left = -(at_solved_2 * made.solved_2).sum(-1) - (at_solved_1 * made.solved_1).sum(-1)
        at_kept = (at_rhs_2 * made.z).sum(-1) + x.eta * (at_rhs_1 * made.answers).sum(-1)
        return (
            self._by(at_z, w2) - self._by(left * made.solved_2, after_2),
            -at_error,
            (at_rhs_1 * (made.error + x.kept[..., None] * made.answers)).sum(-1),
            at_kept,
            at_left,
            (after_2 * w2).sum((-1, -2)) + (after_1 * w1).sum((-1, -2)),
            -self._by(at_rhs_1, made.solved_1.mT).tril(-1) * made.gram,
            self._by(-left * at_solved_2, made.rhs_2.mT),
            grads[0][0],
            grads[1][0],
        )

    def _by(self, a: Tensor, b: Tensor) -> Tensor:
        """A B for all chunks at once, in PyTorch."""
        if self.products == "bf16":
            return (a.bfloat16() @ b.bfloat16()).float()
        return a @ b

    def _empty(self, count: int, *shape: int) -> Tensor:
        """`count` scratch matrices for every sequence."""
        return self.ready.keys.new_empty(count, self.count, *shape)

    def _launch(self, fixed: dict[str, Any], chunk: int, kernel: Any, tiles: int, *tensors: Tensor) -> None:
        own = {name: fixed[name] for name in kernel.arg_names if name in fixed}
        how = {"num_warps": warps(kernel, fixed), "num_stages": STAGES}
        # Triton starts a kernel on the current device, whatever the device of its tensors.
        with torch.cuda.device_of(self.ready.keys):  # type: ignore[no-untyped-call]
            kernel[(tiles, self.count)](*tensors, self.count, chunk, **own, **how)


def constants(size: int, width: int, hidden_width: int, products: str) -> dict[str, Any]:
    """Constants of the kernels for chunks of `size` tokens; each takes those it names."""
    whole = 1 << (hidden_width - 1).bit_length()
    rows = 32 if size <= 64 else 16  # a program holds them as wide as the chunk
    return {
        "C": size,
        "D": width,
        "H": hidden_width,
        "O": width,
        "HP": whole,
        "LOG": size.bit_length() - 1,
        "R": STEP,
        "T": min(size, 32),
        "B": _part(width, 64),
        "BR": _part(width, rows),
        "BH": _part(hidden_width, 64),
        "HR": _part(hidden_width, rows),
        "K": _part(width, 32 if whole <= 256 else 16),
        "KH": _part(hidden_width, 32),
        "P": products,
    }


class Tiles(NamedTuple):
    """Programs of a launch for one sequence: tiles of both layers, their rows only, and tiles of errors."""

    weights: int
    rows: int
    errors: int


def _tiles(fixed: dict[str, Any]) -> Tiles:
    """Of launches with these `constants`."""
    c, d, h, o = (fixed[name] for name in "CDHO")
    wide = h // fixed["HR"] * (d // fixed["B"]) + o // fixed["BR"] * (h // fixed["BH"])
    return Tiles(wide, h // fixed["HR"] + o // fixed["BR"], c // fixed["T"] * (o // fixed["B"]))


def warps(kernel: Any, fixed: dict[str, Any]) -> int:
    """Warps of a program: more where it holds whole rows of a wide hidden layer."""
    return max(4, fixed["HP"] // 32) if kernel in WHOLE_ROWS else 4


def _part(width: int, most: int) -> int:
    """The largest power of two that divides `width`, of at most `most`."""
    return min(most, width & -width)


RESULTS = (
    "W2",
    "W1",
    *(f"gradient at {name}" for name in ("keys", "targets", "eta", "log alpha", "W2", "W1")),
)
COMPARED = ((32, 192, 768), (128, 192, 768))
"""Chunks, hidden widths and widths that `compare` tries: those of `pilot`."""


def compare(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """`differences` at the sizes of `pilot`; inputs are of type `dtype`, and so are products."""
    products = "bf16" if dtype == torch.bfloat16 else precision()
    found: dict[str, float] = {}
    for size, hidden_width, width in COMPARED:
        inputs = example(size, hidden_width, width, device, dtype)
        for what, value in differences(inputs, products).items():
            found[f"{size} tokens, {hidden_width} of {width}: {what}"] = value
    return found


def right(memory: Memories, size: int, products: str) -> bool:
    """Whether the kernels are right for such a memory where it is, see `ops/kernels.py: right`."""
    w2 = memory.weights.w2
    hidden_width, width = w2.shape[-2:]
    return kernels.right(
        ("cms", size, hidden_width, width, w2.device),
        products,
        lambda: differences(example(size, hidden_width, width, w2.device, torch.float32), products),
    )


def differences(inputs: list[Tensor], products: str) -> dict[str, float]:
    """Largest relative differences of `RESULTS` from `by_torch` in float64, which equals the token loop."""
    return kernels.relative(RESULTS, *(outcomes(inputs, how) for how in (products, None)))


def example(
    size: int, hidden_width: int, width: int, device: torch.device, dtype: torch.dtype, chunks: int = 3
) -> list[Tensor]:
    """Random tokens and weights of two sequences."""
    generator = torch.Generator().manual_seed(size)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    k = l2_normalize(random(chunks, 2, size, width) + 0.3)
    v = random(chunks, 2, size, width)
    eta = torch.sigmoid(random(chunks, 2, size)) * 0.2
    log_alpha = F.logsigmoid(random(chunks, 2, size) + 4)
    return [k, v, eta, log_alpha, random(2, hidden_width, width), random(2, width, hidden_width) / width]


def outcomes(inputs: list[Tensor], products: str | None) -> list[Tensor]:
    """Weights at all starts, and gradients of a function of them, by the kernels with such products, or
    (None) by `by_torch` in float64."""
    wide = torch.float64 if products is None else torch.float32
    own = [t.to(wide).detach().requires_grad_() for t in inputs]
    results = by_torch(*own) if products is None else _scan(products, *own)
    loss = sum((t.double().square() * t.double().cos()).sum() for t in results)
    assert isinstance(loss, Tensor)
    return [*(t.detach() for t in results), *torch.autograd.grad(loss, own)]


KERNEL = Kernel("cms", compare)
