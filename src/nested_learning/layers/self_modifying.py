"""Self-modifying Titans (Eqs. 86–90): memories that write themselves, and the rates they write with.

The module holds the slow projections and the initial memories; the equations are in
`ops/self_modifying/chunk.py`.

Shapes: B batch, T tokens, D model width, H heads, d = D / H, N = B·H.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nested_learning.layers.checks import check_heads, check_input, check_kind
from nested_learning.layers.config import READS, Around, MemoryConfig
from nested_learning.layers.conv import CausalConv, ConvState
from nested_learning.layers.documents import Documents, read_apart
from nested_learning.layers.memory import (
    MemoryMLP,
    MemoryState,
    check_memory,
    initial_stack,
    zero_momentum,
)
from nested_learning.layers.norm import RMSNorm
from nested_learning.layers.streams import (
    gate_output,
    make_gate,
    merge_heads,
    project_streams,
    start_rates,
)
from nested_learning.ops.kernels import products_on, use_triton
from nested_learning.ops.memory_mlp.chunk import Memories, WriteTokens
from nested_learning.ops.scan import Piece, run_compiled, run_eager, scan
from nested_learning.ops.self_modifying.chunk import (
    ETA_MAX,
    MEMORY,
    RATES,
    Bank,
    SelfModProgress,
    Streams,
    read_and_write,
)
from nested_learning.state import State

AROUND = Around()
ETA_START = 1 / 20  # the step size at the start of training


@dataclass(frozen=True)
class SelfModState(State):
    """State of `SelfModifyingTitans`.

    Args:
        banks: fast weights of the memories that are written together.
        conv: of the causal convolution.
        pending: what the unfinished chunk will write, `[B, H, n, …]`; None at a boundary.
        position: tokens since a boundary of the larger chunk.
        chunks: names of the memories, and tokens between two writes of each.
    """

    banks: tuple[MemoryState, ...]
    conv: ConvState
    pending: tuple[Tensor | None, ...] | None
    position: int
    chunks: tuple[tuple[str, int], ...]


class SelfModifyingTitans(nn.Module):
    """A sequence mixer whose key, value and rate projections are memories that rewrite themselves.

    Args:
        dim: model width D.
        num_heads: heads H; each has its own memories of width D / H.
        chunk_size: tokens between two writes of M_memory.
        read: "chunk" (Eq. 90), "before_write" (Eq. 86) or "after_write" (Titans).
        config: how memories are written; see `MemoryConfig`.
        around: convolution, activation and output gate.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        chunk_size: int = 64,
        read: str = "chunk",
        config: MemoryConfig | None = None,
        around: Around = AROUND,
    ) -> None:
        super().__init__()
        self.config = config = config or MemoryConfig()
        self._check_sizes(dim, num_heads, chunk_size, read, config)
        self.heads, self.read, self.around, self.compiled = num_heads, read, around, False
        width = dim // num_heads
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = CausalConv(3 * dim, around.conv_window)
        self.rates = nn.Linear(dim, (3 if config.momentum else 2) * num_heads)
        names = (MEMORY, *sorted(config.adaptive, key=RATES.__contains__))  # full width first
        self.memories = nn.ModuleDict(
            {
                name: MemoryMLP(num_heads, width, config.hidden or width, 1 if name in RATES else width)
                for name in names
            }
        )
        others = config.projection_chunk_size or chunk_size
        steps = config.projection_steps(others)
        if others == chunk_size and steps == 1:
            self.layout: tuple[Bank, ...] = (Bank(names, chunk_size),)
        else:
            self.layout = (Bank(names[:1], chunk_size), Bank(names[1:], others, steps))[: len(names)]
        self.chunk = max(bank.chunk for bank in self.layout)
        eta_bias = config.step_bias(ETA_START, config.step_limit(ETA_MAX))
        start_rates(self.rates, num_heads, eta_bias, config.alpha_bias)
        self.norm = RMSNorm(width)
        self.gate = make_gate(dim, around)
        self.out = nn.Linear(dim, dim, bias=False)

    def _check_sizes(self, dim: int, heads: int, chunk: int, read: str, config: MemoryConfig) -> None:
        owner, other = type(self).__name__, config.projection_chunk_size or chunk
        check_heads(dim, heads, owner)
        if read not in READS:
            raise ValueError(f"{owner} read must be one of {', '.join(READS)}, got {read!r}")
        if chunk < 1:
            raise ValueError(f"{owner} chunk_size must be at least 1, got {chunk}")
        if other < 1 or max(other, chunk) % min(other, chunk):
            raise ValueError(
                f"{owner} projection_chunk_size must divide chunk_size = {chunk} or be a multiple of it, "
                f"got {other}"
            )

    @property
    def chunks(self) -> tuple[tuple[str, int], ...]:
        """Names of the memories, and tokens between two writes of each."""
        return tuple((name, bank.chunk) for bank in self.layout for name in bank.names)

    def init_state(self, batch: int) -> SelfModState:
        """State at the start of a context."""
        return self._pack(self._start(batch), self.conv.init_state(batch), batch)

    def forward(
        self, x: Tensor, state: SelfModState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, SelfModState]:
        """`x [B, T, D]` → (`y [B, T, D]`, state). Any split of a sequence gives the same answers.

        `documents`: those of x, each processed as if it were alone in a row; only without a state.
        """
        check_input(x, self.out.in_features, type(self).__name__)
        if documents is not None:
            return read_apart(self, x, state, documents)
        if state is not None:
            self._check_state(state, x)
        batch = x.shape[0]
        streams, conv = self.streams(x, None if state is None else state.conv)
        products = products_on(x.device)
        with torch.autocast(x.device.type, enabled=False):  # fast weights stay in float32
            at = self._start(batch) if state is None else self.unpack(state)
            answers, at = self._read(streams, at, products)
        y = merge_heads(torch.cat(answers, 1) if len(answers) > 1 else answers[0], batch).to(x.dtype)
        return self.out(gate_output(self.gate, self.norm(y).flatten(2), x)), self._pack(at, conv, batch)

    def streams(self, x: Tensor, conv: ConvState | None) -> tuple[Streams, ConvState]:
        """Slow projections of `x [B, T, D]`, and the state of the convolution (None: a start)."""
        return project_streams(self, x, conv)

    def _read(self, x: Streams, at: SelfModProgress, products: str) -> tuple[list[Tensor], SelfModProgress]:
        """Answers `[N, n, d]` to consecutive tokens: whole chunks by our kernels where they can."""
        tokens, first = x.k.shape[1], -at.position % self.chunk
        whole = (tokens - first) // self.chunk * self.chunk
        if whole > 0 and use_triton(x.k.device):
            from nested_learning.ops.self_modifying import triton  # needs the package triton

            rule = self.config, self.layout
            if triton.supports(*rule, self.read, at) and triton.right(*rule, at, products):
                before, chunks, after = x.split([first, whole, tokens - first - whole])
                answers, at = self._scan(before, at) if first else ([], at)
                keep_every = self.config.keep_every
                answer, at = triton.read_and_write(*rule, at, chunks, products, keep_every)
                rest, at = self._scan(after, at) if after.k.shape[1] else ([], at)
                return [*answers, answer, *rest], at
        return self._scan(x, at)

    def _scan(self, x: Streams, at: SelfModProgress) -> tuple[list[Tensor], SelfModProgress]:
        run = run_compiled if self.compiled and not self._one_graph else run_eager
        how = (self.config, self.layout, self.read, run)
        answers, at = scan(read_and_write, how, at, self._pieces(x, at.position))
        return answers, at

    def _pieces(self, x: Streams, position: int) -> list[Piece]:
        """The tokens up to a boundary, then whole stretches of chunks, then the rest; see `scan`."""
        tokens, every = x.k.shape[1], self.config.keep_every
        stretch = (every or 1) * self.chunk
        first = min(-position % self.chunk, tokens)
        whole = (tokens - first) // stretch
        lengths = [first, *[stretch] * whole, tokens - first - whole * stretch]
        lengths = [length for length in lengths if length]
        return [
            Piece(part, self._one_graph and length == stretch, every is not None and not self._one_graph)
            for part, length in zip(x.split(lengths), lengths, strict=True)
        ]

    @property
    def _one_graph(self) -> bool:
        """Whether a whole chunk is one compiled graph: not where it would hold many short chunks."""
        return self.compiled and len(self.layout) == 1 and self.config.keep_every in (None, 1)

    def _check_state(self, state: SelfModState, x: Tensor) -> None:
        owner = type(self).__name__
        check_kind(state, SelfModState, owner)
        if state.chunks != self.chunks:
            raise ValueError(
                f"{owner} state must be of memories with chunk sizes {dict(self.chunks)}, "
                f"got {dict(state.chunks)}"
            )
        for bank, held in zip(self.layout, state.banks, strict=True):
            check_memory(held, self._modules_of(bank), self.config.momentum, x, owner)

    def _modules_of(self, bank: Bank) -> list[MemoryMLP]:
        return [module for name in bank.names if isinstance(module := self.memories[name], MemoryMLP)]

    def _start(self, batch: int) -> SelfModProgress:
        banks = []
        for bank in self.layout:
            weights = initial_stack(self._modules_of(bank), batch)
            momentum = zero_momentum(weights) if self.config.momentum else None
            banks.append(Memories(weights, momentum, weights if self.config.to_initial else None))
        return SelfModProgress(tuple(banks), None, 0)

    def unpack(self, state: SelfModState) -> SelfModProgress:
        """Where the sequences of a state stand, with batch and heads as one dimension."""
        banks = []
        for bank, held in zip(self.layout, state.banks, strict=True):
            batch = held.w2.shape[0]
            rest = initial_stack(self._modules_of(bank), batch) if self.config.to_initial else None
            banks.append(Memories(*held.unpack(), rest))
        pending = state.pending
        if pending is not None:
            pending = WriteTokens(*(None if t is None else t.flatten(0, 1) for t in pending))  # type: ignore[arg-type]
        return SelfModProgress(tuple(banks), pending, state.position)

    def _pack(self, at: SelfModProgress, conv: ConvState, batch: int) -> SelfModState:
        banks = tuple(MemoryState.pack(bank.weights, bank.momentum, batch) for bank in at.banks)
        pending = at.pending
        packed = None
        if pending is not None:
            packed = tuple(None if t is None else t.view(batch, -1, *t.shape[1:]) for t in pending)
        return SelfModState(banks, conv, packed, at.position, self.chunks)


class TitansMemory(SelfModifyingTitans):
    """Titans, as a baseline: M_memory written towards the slow values v, with slow projections and rates.

    `SelfModifyingTitans` with no adaptive projection and no self-made targets; the arguments are the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        chunk_size: int = 64,
        read: str = "chunk",
        config: MemoryConfig | None = None,
        around: Around = AROUND,
    ) -> None:
        slow = replace(config or MemoryConfig(), adaptive=(), self_targets=False)
        super().__init__(dim, num_heads, chunk_size, read, slow, around)
