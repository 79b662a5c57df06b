"""Self-modifying Titans over whole chunks, with one Triton kernel per chunk and direction.

The equations are those of `chunk.py`. One program has one memory of one sequence and head. What it needs of
the others are keys, values and rates of the chunk, which the projections among them make from their weights
at its start. So a launch of `forward.py` writes a memory over one chunk, then lets it project the tokens of
the next one, and the launch after it reads that.

Backwards the same in reverse (`backward.py`): first the gradient through the projection of the chunk after,
for which the other programs left their gradients at keys, values and rates in the launch before; then through
the write of this chunk. So a chunk takes one launch in either direction. Stored for the way back are the
weights at starts of chunks and what they project: at all of them, or at every `keep_every`-th, and then the
chunks between two of these are run forward again.

Memories of output width 1 (the rates) have second layers padded with rows of zeros, which stay zero.

Shapes: `N` sequences times heads, `M` memories, `T` tokens, `C` tokens of a chunk, `D` width of a head.
States, gradients and sums are in float32. Products are in the precision of `ops/kernels.py: products_on`;
where that is bf16, so is the scratch memory of a launch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops import kernels
from nested_learning.ops.kernels import Kernel, precision
from nested_learning.ops.memory_mlp.chunk import Memories, Stack
from nested_learning.ops.scan import run_eager
from nested_learning.ops.self_modifying import chunk
from nested_learning.ops.self_modifying.backward import backward
from nested_learning.ops.self_modifying.chunk import ETA_MAX, Bank, SelfModProgress, SelfModRule, Streams
from nested_learning.ops.self_modifying.forward import SLOTS, VECTORS, forward
from nested_learning.ops.unit import l2_normalize

SIZES = (16, 32, 64, 128)
"""Widths of a head and chunks in tokens that the kernels take."""
Weights = tuple[Tensor, Tensor]


class Start(NamedTuple):
    """Of a chunk: the weights `[N, M, D, D]`, and what they project of its tokens, `[N, M, C, D]`."""

    w2: Tensor
    w1: Tensor
    seen: Tensor

    @property
    def weights(self) -> Weights:
        """Second and first layers."""
        return self.w2, self.w1


class Layout(NamedTuple):
    """What the kernels must know of a layer."""

    names: tuple[str, ...]  # of all memories; M is the first, those of output width 1 the last
    full: int  # how many are as wide as a head
    slow: int  # number of the first whose η is `steps` times that of M
    chunk: int
    limit: float  # of η
    steps: float
    self_targets: bool
    stop_gradient_targets: bool
    retention: bool
    control: bool

    @classmethod
    def of(cls, rule: SelfModRule, banks: tuple[Bank, ...]) -> Layout:
        """The layout of the banks of a layer, whose chunks must be the same."""
        names = tuple(name for bank in banks for name in bank.names)
        slow = len(banks[0].names) if len(banks) > 1 else len(names)
        return cls(
            names=names,
            full=sum(bank.full for bank in banks),
            slow=slow,
            chunk=banks[0].chunk,
            limit=rule.step_limit(ETA_MAX),
            steps=banks[-1].steps,
            self_targets=rule.self_targets,
            stop_gradient_targets=rule.stop_gradient_targets,
            retention=rule.retention,
            control=rule.step_control == "clamp",
        )

    def number(self, name: str) -> int:
        """Of a memory; −1: there is none of this name."""
        return self.names.index(name) if name in self.names else -1


PROJECTIONS = ("k", "v", "q", "eta", "alpha")


HOPPER = 9
"""Compute capability from which on a card has products of 64 rows that leave registers free."""


def capability(device: torch.device) -> int:
    """The larger part of a card's compute capability; of a CPU, which interprets kernels, that of Hopper."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else HOPPER


def constants(layout: Layout, width: int, products: str, capability: int) -> dict[str, Any]:
    """Constants that both kernels are compiled with for a card of this `capability`."""
    size = layout.chunk
    largest = max(size, width)
    rows = 16 if largest > 64 else 64 if products == "bf16" and capability >= HOPPER else 32
    return {
        "M": len(layout.names),
        "C": size,
        "D": width,
        "S": size * largest,
        "LOG": size.bit_length() - 1,
        "R": min(rows, size, width),
        "P": products,
        "FULL": layout.full,
        "SLOW": layout.slow,
        **{f"I{letter}": layout.number(name) for letter, name in zip("KVQEA", PROJECTIONS, strict=True)},
        "OWN": layout.self_targets,
        "RETAIN": layout.retention,
        "CONTROL": layout.control,
    }


def warps(layout: Layout, width: int, products: str) -> int:
    """Warps of a program: as many as keep its rows of the widest matrix in registers."""
    return 4 if max(layout.chunk, width) <= (32 if products == "tf32x3" else 64) else 8


def supports(rule: SelfModRule, banks: tuple[Bank, ...], which: str, at: SelfModProgress) -> bool:
    """Whether the kernels have this rule: the arguments of `chunk.read_and_write`."""
    plain = rule.delta and not rule.momentum and not rule.to_initial and rule.error_limit is None
    shapes = [memories.weights.w2.shape[-2:] for memories in at.banks]
    one_width = all(hidden == width == shapes[0][0] for hidden, width in shapes)
    one_chunk = len({bank.chunk for bank in banks}) == 1
    sizes = banks[0].chunk in SIZES and shapes[0][0] in SIZES
    single = at.banks[0].weights.w2.dtype == torch.float32
    return plain and which == "chunk" and one_width and one_chunk and sizes and single


@torch.compiler.disable
def read_and_write(
    rule: SelfModRule,
    banks: tuple[Bank, ...],
    at: SelfModProgress,
    x: Streams,
    products: str,
    keep_every: int | None = None,
) -> tuple[Tensor, SelfModProgress]:
    """Answers `[N, T, D]` to whole chunks of tokens from a boundary on, and where the sequences stand then.

    The rule must be one that `supports` accepts. Gradients reach everything, second ones by `chunk.py`.

    Args:
        products: their precision, see `ops/kernels.py: products_on`.
        keep_every: chunks between two starts that are stored for the backward pass (None: all are).
    """
    w2, w1 = join(at.banks)
    streams = torch.stack([x.k, x.v, x.q])
    y, w2, w1 = _Scan.apply(  # type: ignore[no-untyped-call]
        rule, banks, products, keep_every or 1, streams, x.rates, w2, w1
    )
    return y, SelfModProgress(split(banks, w2, w1), None, 0)


def join(memories: tuple[Memories, ...]) -> Weights:
    """First and second layers of all memories, each `[N, M, D, D]`: zeros are added to narrow outputs."""
    w2 = torch.cat([one.weights.w2 for one in memories], 1)
    seconds = [w1 for one in memories for w1 in one.weights.w1]
    return w2, torch.cat([F.pad(w, (0, 0, 0, w2.shape[-1] - w.shape[-2])) for w in seconds], 1)


def split(banks: tuple[Bank, ...], w2: Tensor, w1: Tensor) -> tuple[Memories, ...]:
    """Inverse of `join`."""
    found, first = [], 0
    for bank in banks:
        middle, last = first + bank.full, first + len(bank.names)
        groups = [w1[:, first:middle]] if bank.full else []
        groups += [w1[:, middle:last, :1]] if last > middle else []
        found.append(Memories(Stack(w2[:, first:last], tuple(groups)), None, None))
        first = last
    return tuple(found)


class _Scan(torch.autograd.Function):
    """Streams `[3, N, T, D]`, slow logits `[2, N, T]` and weights `[N, M, D, D]` to answers and weights."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: SelfModRule,
        banks: tuple[Bank, ...],
        products: str,
        every: int,
        x: Tensor,
        rates: Tensor,
        w2: Tensor,
        w1: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        launches = Launches(Layout.of(rule, banks), x, rates, products)
        kept = every if any(ctx.needs_input_grad) else None
        y, starts, after = launches.read(w2.contiguous(), w1.contiguous(), kept)
        ctx.rule, ctx.banks, ctx.products, ctx.every = rule, banks, products, every
        ctx.save_for_backward(x, rates, *(t for start in starts for t in start))
        return y, *after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rates, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return *[None] * 4, *_differentiable(ctx.rule, ctx.banks, (x, rates, *kept[:2]), grads)
        launches = Launches(Layout.of(ctx.rule, ctx.banks), x, rates, ctx.products)
        starts = [Start(*start) for start in zip(kept[::3], kept[1::3], kept[2::3], strict=True)]
        return *[None] * 4, *launches.back(starts, ctx.every, *grads)


def _differentiable(
    rule: SelfModRule, banks: tuple[Bank, ...], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of `_Scan` at its inputs as functions of them and of `grads`, by `chunk.py`."""
    (k, v, q), rates, w2, w1 = inputs
    at = SelfModProgress(split(banks, w2, w1), None, 0)
    y, after = chunk.read_and_write(rule, banks, "chunk", run_eager, at, Streams(k, v, q, rates))
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad((y, *join(after.banks)), wanted, grads, create_graph=True))
    return tuple(next(found) if t.requires_grad else None for t in inputs)


class Parts(NamedTuple):
    """What memories leave to the launch after: gradients at the keys and values `[N, M, C, D]` of a chunk, at
    its queries `[N, C, D]`, and at η and log α `[N, M, 2, C]`."""

    k: Tensor
    v: Tensor
    q: Tensor
    rates: Tensor


class Launches:
    """The launches over one run of whole chunks: streams `x [3, N, T, D]`, slow logits `rates [2, N, T]`."""

    def __init__(self, layout: Layout, x: Tensor, rates: Tensor, products: str) -> None:
        self.layout, self.x, self.rates = layout, x.contiguous(), rates.contiguous()
        _, self.count, self.tokens, self.width = x.shape
        self.fixed = constants(layout, self.width, products, capability(x.device))
        self.warps = warps(layout, self.width, products)
        self.programs = self.count * len(layout.names)
        narrow = torch.bfloat16 if products == "bf16" else torch.float32
        self.scratch = x.new_empty(self.programs * SLOTS.value * self.fixed["S"], dtype=narrow)
        self.vectors = x.new_empty(self.programs * VECTORS.value * layout.chunk)

    def read(self, w2: Tensor, w1: Tensor, every: int | None) -> tuple[Tensor, list[Start], Weights]:
        """Answers `[N, T, D]`, every so many chunks' start (None: no start), and the weights at the end."""
        chunks = self.tokens // self.layout.chunk
        y, now, starts = torch.empty_like(self.x[0]), Start(w2, w1, self._project((w2, w1))), []
        for number in range(chunks):
            if every and number % every == 0:
                starts.append(now)
            now = self._write(number, now, y, project=number + 1 < chunks)
        return y, starts, now.weights

    def _project(self, now: Weights) -> Tensor:
        """What projections add to the streams of the first chunk, `[N, M, C, D]`."""
        seen = self._empty(self.layout.chunk, self.width)
        unread = now[0]  # stands for what such a launch does not touch
        self._forward(
            0, Start(*now, unread), Start(*now, seen), unread, write=False, project=True, answer=False
        )
        return seen

    def _write(self, number: int, now: Start, y: Tensor | None, project: bool) -> Start:
        """The start of the chunk after one; answers to it go into `y`."""
        after = Start(*(torch.empty_like(t) for t in now))
        given = now.seen if y is None else y
        self._forward(number, now, after, given, write=True, project=project, answer=y is not None)
        return after

    def _forward(
        self,
        number: int,
        now: Start,
        after: Start,
        y: Tensor,
        *,
        write: bool,
        project: bool,
        answer: bool,
    ) -> None:
        numbers = (self.count, self.tokens, number * self.layout.chunk, self.layout.limit, self.layout.steps)
        weights = *now.weights, *after.weights
        tensors = (self.x, self.rates, now.seen, after.seen, *weights, y, self.scratch, self.vectors)
        self._launch(forward, *tensors, *numbers, int(write), int(project), int(answer))

    def back(
        self, starts: list[Start], every: int, grad_y: Tensor, grad_w2: Tensor, grad_w1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients at streams, slow logits and initial weights, from those at what `read` returns, which
        stored the start of `every` so many chunks."""
        chunks = self.tokens // self.layout.chunk
        grads = tuple(grad.clone(memory_format=torch.contiguous_format) for grad in (grad_w2, grad_w1))
        at_streams, at_rates = torch.empty_like(self.x), torch.empty_like(self.rates)
        at_sources = self._empty(self.tokens, self.width)
        outputs = (grad_y.contiguous(), *grads, at_streams, at_rates, at_sources)
        left, parts = self._parts(), self._parts()
        after: Start | None = None
        for first in reversed(range(0, chunks, every)):
            segment = self._again(first, min(every, chunks - first), starts[first // every])
            for number, now in reversed(list(enumerate(segment, first))):
                self._backward(number, now, after, outputs, parts, left, write=True)
                after, left, parts = now, parts, left
        self._backward(0, starts[0], starts[0], outputs, parts, left, write=False)
        for number, name in enumerate(self.layout.names[1:], 1):
            at_streams[{"v": 1, "q": 2}.get(name, 0)] += at_sources[:, number]
        return at_streams, at_rates, grads[0], grads[1]

    def _again(self, first: int, count: int, start: Start) -> list[Start]:
        """The starts of `count` chunks from number `first`."""
        starts = [start]
        for number in range(first, first + count - 1):
            starts.append(self._write(number, starts[-1], None, project=True))
        return starts

    def _backward(
        self,
        number: int,
        now: Start,
        after: Start | None,
        outputs: tuple[Tensor, ...],
        parts: Parts,
        left: Parts,
        write: bool,
    ) -> None:
        other = after or now  # of the last chunk nothing comes after, and nothing is read
        numbers = (self.count, self.tokens, number * self.layout.chunk, self.layout.limit, self.layout.steps)
        weights = *now.weights, *other.weights
        tensors = (self.x, self.rates, now.seen, other.seen, *weights, *outputs, *parts, *left)
        stop = self.layout.stop_gradient_targets
        flags = int(write), int(after is not None)
        self._launch(backward, *tensors, self.scratch, self.vectors, *numbers, *flags, STOP=stop)

    def _launch(self, kernel: Any, *arguments: Any, **flags: bool) -> None:
        # Triton starts a kernel on the current device, whatever the device of its tensors.
        with torch.cuda.device_of(self.x):  # type: ignore[no-untyped-call]
            kernel[(self.programs,)](*arguments, **self.fixed, **flags, num_warps=self.warps, num_stages=1)

    def _empty(self, *shape: int) -> Tensor:
        """A tensor for all memories, `[N, M, …]`."""
        return self.x.new_empty(self.count, len(self.layout.names), *shape)

    def _parts(self) -> Parts:
        size, width = self.layout.chunk, self.width
        q = self.x.new_empty(self.count, size, width)
        return Parts(self._empty(size, width), self._empty(size, width), q, self._empty(2, size))


RESULTS = (
    *("answers", "W2", "W1", "gradient at streams", "gradient at rates"),
    *("gradient at W2", "gradient at W1"),
)
COMPARED = ((64, 64),)
"""Head widths and chunks that `compare` tries; each has kernels of its own, which take a while to compile."""


def compare(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """`differences` of self-modifying Titans and Titans; inputs are of type `dtype`, and so are products."""
    found: dict[str, float] = {}
    products = "bf16" if dtype == torch.bfloat16 else precision()
    for width, size in COMPARED:
        for name, adaptive in (("self_mod", ("k", "v", "eta", "alpha")), ("titans", ())):
            rule = SelfModRule(adaptive=adaptive, self_targets=bool(adaptive))
            banks = banks_of(rule, size)
            inputs = example(banks, width, device, dtype)
            for what, value in differences(rule, banks, inputs, products).items():
                found[f"{name} {width} x {size}: {what}"] = value
    return found


def right(rule: SelfModRule, banks: tuple[Bank, ...], at: SelfModProgress, products: str) -> bool:
    """Whether the kernels of such a layer are right where its weights are, see `ops/kernels.py: right`."""
    weights = at.banks[0].weights.w2
    device, width = weights.device, weights.shape[-1]
    return kernels.right(
        ("self_modifying", Layout.of(rule, banks), width, device),
        products,
        lambda: differences(rule, banks, example(banks, width, device, torch.float32), products),
    )


def differences(
    rule: SelfModRule, banks: tuple[Bank, ...], inputs: list[Tensor], products: str
) -> dict[str, float]:
    """Largest relative differences of `RESULTS` from `chunk.py` in float64, which equals the token loop."""
    return kernels.relative(RESULTS, *(outcomes(rule, banks, inputs, how) for how in (products, None)))


def banks_of(rule: SelfModRule, size: int) -> tuple[Bank, ...]:
    """The banks of a layer in which all memories have chunks of `size` tokens."""
    projections = tuple(sorted(rule.adaptive, key=chunk.RATES.__contains__))
    banks = (Bank((chunk.MEMORY,), size), Bank(projections, size, rule.projection_steps(size)))
    return banks if projections else banks[:1]


def example(
    banks: tuple[Bank, ...],
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    count: int = 2,
    chunks: int = 3,
) -> list[Tensor]:
    """Random streams, slow logits and weights of `count` sequences of some chunks."""
    size, memories = banks[0].chunk, sum(len(bank.names) for bank in banks)
    generator = torch.Generator().manual_seed(size)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x = l2_normalize(random(3, count, chunks * size, width) + 0.3)
    bias = torch.tensor([-1.0, 4.0], device=device, dtype=dtype)[:, None, None]
    rates = random(2, count, chunks * size) + bias
    w2, w1 = (random(count, memories, width, width) for _ in range(2))
    w1 = w1 / width
    w1[:, sum(bank.full for bank in banks) :, 1:] = 0
    return [x, rates, w2, w1]


def outcomes(
    rule: SelfModRule, banks: tuple[Bank, ...], inputs: list[Tensor], products: str | None
) -> list[Tensor]:
    """Answers, weights after, and gradients of a function of them, by the kernels with such products, or
    (None) by `chunk.py` in float64."""
    wide = torch.float64 if products is None else torch.float32
    x, rates, w2, w1 = own = [t.to(wide).detach().requires_grad_() for t in inputs]
    streams, at = Streams(x[0], x[1], x[2], rates), SelfModProgress(split(banks, w2, w1), None, 0)
    if products is None:
        y, after = chunk.read_and_write(rule, banks, "chunk", run_eager, at, streams)
    else:
        y, after = read_and_write(rule, banks, at, streams, products)
    results = [y, *join(after.banks)]
    loss = sum((t.double().square() * t.double().cos()).sum() for t in results)
    assert isinstance(loss, Tensor)
    *grads, at_w1 = torch.autograd.grad(loss, own)
    full = sum(bank.full for bank in banks)
    at_w1[:, full:, 1:] = 0  # rows that are not there
    return [*(t.detach() for t in results), *grads, at_w1]


KERNEL = Kernel("self_modifying", compare)
