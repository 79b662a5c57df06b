"""The Continuum Memory System (Eqs. 70–74): MLP blocks, each with its own update period.

A level without a `chunk_size`, or with one longer than a training sequence, is an ordinary SwiGLU MLP.
Another is a two-layer memory of each sequence, written every `chunk_size` tokens. Each level has a norm
before it; in the chain (sequential and nested) each has a residual around it, so one ordinary level is the
MLP of a Transformer block.

Shapes: B batch, T tokens, D model width, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.layers.checks import check_input, check_kind
from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.documents import Documents, check_documents, read_apart
from nested_learning.layers.memory import (
    MemoryMLP,
    MemoryState,
    check_memory,
    initial_stack,
    zero_momentum,
)
from nested_learning.layers.mlp import SwiGLU, swiglu_width
from nested_learning.layers.norm import RMSNorm
from nested_learning.layers.streams import split_rates
from nested_learning.levels import LevelSpec, check_levels, kind_of, reset_periods
from nested_learning.ops.cms.chunk import LevelPiece, LevelProgress, answer_and_write
from nested_learning.ops.kernels import products_on, use_triton
from nested_learning.ops.memory_mlp.chunk import Memories, WriteTokens, chunk_limit
from nested_learning.ops.scan import Piece, put_together, scan, take_apart
from nested_learning.ops.segments import segments
from nested_learning.ops.unit import l2_normalize
from nested_learning.state import State

ETA_START = 1 / 128  # the step size at the start of training; 1/20 cost 2 % of the loss of `pilot_smoke`


@dataclass(frozen=True)
class FastLevelState(State):
    """Fast weights of a level, and where its sequence stands.

    Args:
        memory: the weights, one set per sequence.
        pending: what the unfinished chunk will write (`[B, 1, n, …]`, None = nothing).
        last: the key that waits for the next token `[B, 1, D]` (None where it is written with its own).
        chunk_size: of the level that it belongs to.
        position: tokens since the start of the context.
        writes, resets: how often the level was written, and put back to its initial state in between.
    """

    memory: MemoryState
    pending: tuple[Tensor | None, ...] | None
    last: Tensor | None
    chunk_size: int
    position: int = 0
    writes: int = 0
    resets: int = 0


@dataclass(frozen=True)
class CMSState(State):
    """One state per level; None for ordinary levels that are not adapted."""

    levels: tuple[Any, ...]


def level_memory(spec: LevelSpec, memory: MemoryConfig) -> MemoryConfig:
    """`memory` with the switches that `spec` sets. (The cap is the mixer's, whatever else it needs.)"""
    own = {name: getattr(spec, name) for name in ("retention", "delta", "momentum")}
    set_here = {name: value for name, value in own.items() if value is not None}
    return replace(memory, injection_cap=False, **set_here)


class FastLevel(nn.Module):
    """y = norm(W₁ σ̂(W₂ x̂)), with W₁ and W₂ written every `chunk_size` tokens.

    At its own input x̂ of one token it learns a projection of the next token's input (or what else
    `spec.key` and `spec.target` say); all tokens of a chunk read the weights of its start (Eq. 90).

    Args:
        dim: model width.
        spec: chunk size, expansion (hidden width over model width, 1 by default) and switches.
        memory: switches and rates that `spec` leaves open.
        reset_every: tokens after which the memory goes back to its initial state; None = never.
        eps: added to mean squares in the norm.
    """

    def __init__(
        self,
        dim: int,
        spec: LevelSpec,
        memory: MemoryConfig,
        reset_every: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if spec.chunk_size is None:
            raise ValueError(f"levels.{spec.name}.chunk_size must be a number for a fast level, got None")
        self.spec, self.chunk_size, self.reset_every = spec, spec.chunk_size, reset_every
        self.config = config = level_memory(spec, memory)
        self.limit = config.step_limit(chunk_limit(self.chunk_size))
        hidden = round(dim * (spec.expansion or 1))
        if hidden < 1:
            raise ValueError(
                f"levels.{spec.name}.expansion must leave at least one hidden unit of dim = {dim}, "
                f"got {spec.expansion}"
            )
        self.initial = MemoryMLP(1, dim, hidden, dim)
        self.values = nn.Linear(dim, dim, bias=False)
        self.norm = None if spec.gain is None else RMSNorm(dim, eps, spec.gain)
        self.keys = nn.Linear(dim, dim, bias=False) if spec.key == "projected" else None
        learned = {"eta": spec.eta is None, "alpha": config.retention, "beta": config.momentum}
        self.learned = [name for name, is_learned in learned.items() if is_learned]
        self.rates = nn.Linear(dim, len(self.learned)) if self.learned else None
        if self.rates is not None:
            bias = {"eta": config.step_bias(ETA_START, self.limit), "alpha": config.alpha_bias, "beta": 0.0}
            nn.init.normal_(self.rates.weight, std=0.02)
            with torch.no_grad():
                self.rates.bias.copy_(torch.tensor([bias[name] for name in self.learned]))
        self.shared = None if spec.key == "projected" else spec.target  # whether keys are inputs too
        self.compiled = False

    def init_state(self, batch: int, plain: bool = False) -> FastLevelState:
        """State at the start of a context; `plain` is for ordinary levels."""
        start = self._start(batch)
        memory = MemoryState.pack(start.weights, start.momentum, batch)
        like = start.weights.w2
        last = like.new_zeros(batch, 1, like.shape[-1]) if self.spec.target == "next" else None
        return FastLevelState(memory, None, last, self.chunk_size)

    def forward(
        self, x: Tensor, state: FastLevelState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, FastLevelState]:
        """`x [B, T, D]` → (`y [B, T, D]`, state). `documents`: those of x; only without a state."""
        check_input(x, self.values.in_features, "FastLevel")
        if documents is not None:
            return read_apart(self, x, state, documents)
        batch, tokens, _ = x.shape
        if state is None:
            state = self.init_state(batch)
        else:
            self._check_state(state, x)
        queries = l2_normalize(x.to(torch.promote_types(x.dtype, torch.float32)))
        written, last = self.tokens(x, queries, state.last)
        products = products_on(x.device)
        with torch.autocast(x.device.type, enabled=False):  # fast weights stay in float32
            answers, at = self._read(self.unpack(state), queries, written, state.position, products)
        ends = self._ends(segments(tokens, state.position, self.chunk_size), state.position)
        y = torch.cat(answers, 1)
        after = FastLevelState(
            MemoryState.pack(at.memory.weights, at.memory.momentum, batch),
            None if at.pending is None else tuple(None if t is None else t.unsqueeze(1) for t in at.pending),
            last,
            self.chunk_size,
            state.position + tokens,
            state.writes + ends.count("write"),
            state.resets + ends.count("reset"),
        )
        return (y if self.norm is None else self.norm(y)).to(x.dtype), after

    def _read(
        self, at: LevelProgress, queries: Tensor, tokens: WriteTokens, position: int, products: str
    ) -> tuple[list[Tensor], LevelProgress]:
        """Answers `[B, n, D]` to consecutive runs of tokens, the first of them number `position`.

        Contexts that start anew do not wait for one another.
        """
        count, every = queries.shape[1], self.reset_every or 1
        first = -position % every
        contexts = (count - first) // every
        if self.reset_every is None or contexts < 2:
            return self._read_on(at, queries, tokens, position, products)
        runs = [first, contexts * every, count - first - contexts * every]
        asked, written = torch.split(queries, runs, 1), tokens.split(runs)
        answers: list[Tensor] = []
        if first:
            answers, at = self._read_on(at, asked[0], written[0], position, products)
        y, at = self._read_contexts(at, asked[1], written[1], products)
        answers.append(y)
        if runs[2]:
            rest, at = self._read_on(at, asked[2], written[2], 0, products)
            answers += rest
        return answers, at

    def _read_contexts(
        self, at: LevelProgress, queries: Tensor, tokens: WriteTokens, products: str
    ) -> tuple[Tensor, LevelProgress]:
        """Answers to whole contexts `[B, S·reset_every, …]`, as sequences beside one another."""
        assert self.reset_every is not None
        batch, every = queries.shape[0], self.reset_every
        contexts = queries.shape[1] // every
        folded, *write = (
            None if t is None else t.reshape(batch * contexts, every, *t.shape[2:])
            for t in (queries, *tokens)
        )
        assert folded is not None
        starts = _one_after_another(at.memory, at.start, contexts)
        begin = LevelProgress(starts, None, starts)
        answers, _ = self._read_on(begin, folded, WriteTokens(*write), 0, products)  # type: ignore[arg-type]
        return torch.cat(answers, 1).view(queries.shape), LevelProgress(at.start, None, at.start)

    def _read_on(
        self, at: LevelProgress, queries: Tensor, tokens: WriteTokens, position: int, products: str
    ) -> tuple[list[Tensor], LevelProgress]:
        """Answers to consecutive runs of tokens: whole chunks by our kernels where they can."""
        count, size = queries.shape[1], self.chunk_size
        lengths = segments(count, position, size)
        first = -position % size
        written = self._ends(lengths, position)[1 if first else 0 :]  # from the first boundary on
        whole = next((i for i, end in enumerate(written) if end != "write"), len(written)) * size
        if whole > 0 and use_triton(queries.device):
            from nested_learning.ops.cms import triton  # needs the package triton

            about = at.memory, size
            if triton.supports(self.config, *about) and triton.right(*about, products):
                runs = [first, whole, count - first - whole]
                asked, write = torch.split(queries, runs, 1), tokens.split(runs)
                start, at = self._scan(at, asked[0], write[0], position)
                answer, at = triton.read_and_write(at, asked[1], write[1], size, products)
                rest, at = self._scan(at, asked[2], write[2], position + first + whole)
                return [*start, answer, *rest], at
        return self._scan(at, queries, tokens, position)

    def _scan(
        self, at: LevelProgress, queries: Tensor, tokens: WriteTokens, position: int
    ) -> tuple[list[Tensor], LevelProgress]:
        lengths = segments(queries.shape[1], position, self.chunk_size)
        ends = self._ends(lengths, position)
        ready = tokens.prepare_chunks(self.config.delta, lengths, self.chunk_size)
        pieces = map(LevelPiece, torch.split(queries, lengths, 1), tokens.split(lengths), ends, ready)
        how = (self.config, self.shared)
        return scan(answer_and_write, how, at, [self._run(piece) for piece in pieces])

    def _ends(self, lengths: list[int], position: int) -> list[str | None]:
        """What happens at the end of every piece, the first of which begins at `position`."""
        ends: list[str | None] = []
        for length in lengths:
            position += length
            resets = self.reset_every is not None and position % self.reset_every == 0
            writes = position % self.chunk_size == 0
            ends.append("reset" if resets else "write" if writes else None)
        return ends

    def _run(self, piece: LevelPiece) -> Piece:
        return Piece(piece, self.compiled and piece.ready is not None, self.config.keep_every is not None)

    def _check_state(self, state: FastLevelState, x: Tensor) -> None:
        check_kind(state, FastLevelState, "FastLevel")
        if state.chunk_size != self.chunk_size:
            raise ValueError(
                f"FastLevel state must be of chunk size {self.chunk_size}, got one of {state.chunk_size}"
            )
        if (state.last is None) != (self.spec.target == "same"):
            raise ValueError(f"FastLevel state must be of a level with target {self.spec.target!r}")
        check_memory(state.memory, [self.initial], self.config.momentum, x, "FastLevel")

    def _start(self, batch: int) -> Memories:
        weights = initial_stack([self.initial], batch)
        momentum = zero_momentum(weights) if self.config.momentum else None
        return Memories(weights, momentum, weights if self.config.to_initial else None)

    def unpack(self, state: FastLevelState) -> LevelProgress:
        """Where the sequences of a state stand."""
        start = self._start(state.memory.w2.shape[0])
        pending = state.pending
        if pending is not None:
            pending = WriteTokens(*(None if t is None else t.squeeze(1) for t in pending))  # type: ignore[arg-type]
        return LevelProgress(Memories(*state.memory.unpack(), start.initial), pending, start)

    def tokens(self, x: Tensor, queries: Tensor, last: Tensor | None) -> tuple[WriteTokens, Tensor | None]:
        """Keys, targets and rates of every token's write, and the key that waits for its next token."""
        keys = queries
        if self.keys is not None:
            keys = l2_normalize(self.keys(x).to(queries.dtype))
        if last is not None:
            keys, last = torch.cat([last.to(keys.dtype), keys[:, :-1]], 1), keys[:, -1:]
        logits: dict[str, Tensor] = {}
        if self.rates is not None:
            logits = dict(zip(self.learned, split_rates(self.rates(x), 1).to(queries.dtype), strict=True))
        zero = torch.zeros_like(queries[..., 0])
        eta, log_alpha, log_beta = self.config.rates(
            [logits.get(name, zero) for name in ("eta", "alpha", "beta")], self.limit
        )
        if self.spec.eta is not None:
            eta = self.config.control(torch.full_like(zero, self.spec.eta), log_alpha)
        return WriteTokens(keys, self.values(x).to(queries.dtype), eta, log_alpha, log_beta), last


def _one_after_another(first: Memories, start: Memories, contexts: int) -> Memories:
    """Memories at the starts of S contexts of every sequence, `[B·S, …]`: `first`, then always `start`."""
    ours: list[Tensor] = []
    others: list[Tensor] = []
    frame = take_apart(first, ours)
    take_apart(start, others)
    pairs = zip(ours, others, strict=True)
    rows = ([a.unsqueeze(1), b.unsqueeze(1).expand(-1, contexts - 1, *b.shape[1:])] for a, b in pairs)
    made: Memories = put_together(frame, (torch.cat(row, 1).flatten(0, 1) for row in rows))
    return made


class CMS(nn.Module):
    """Levels with their own update periods, each with a norm before it.

    Args:
        dim: model width.
        levels: the levels, in the order they are applied.
        variant: "sequential" (Eq. 73): a chain, each level with a residual around it. "nested" (Eq. 72): the
            same chain; when a fast level is written, the next faster one goes back to its initial state,
            which learns from all the contexts that start with it. "independent" (Eq. 74): all levels see the
            same input; x plus the sum of their outputs, weighted by a learned softmax.
        memory: how fast levels are written, where they do not say it themselves.
        eps: added to mean squares in the norms.
        seq_len: tokens of a training sequence; a level with a longer period is slow. None = no level is.
        heads: groups of channels with softmax weights of their own ("independent" only).
    """

    def __init__(
        self,
        dim: int,
        levels: Sequence[LevelSpec],
        variant: str = "sequential",
        memory: MemoryConfig | None = None,
        eps: float = 1e-6,
        seq_len: int | None = None,
        heads: int = 1,
    ) -> None:
        super().__init__()
        check_levels(levels)
        memory = memory or MemoryConfig()
        resets = reset_periods(levels, variant, seq_len)
        if dim % heads:
            raise ValueError(f"heads must divide dim = {dim}, got {heads}")
        self.dim, self.specs, self.variant = dim, tuple(levels), variant
        self.kinds = tuple(kind_of(spec, seq_len) for spec in levels)
        self.norms = nn.ModuleList(RMSNorm(dim, eps) for _ in levels)
        self.levels = nn.ModuleList(
            FastLevel(dim, spec, memory, reset, eps)
            if kind == "fast"
            else SwiGLU(dim, swiglu_width(dim, spec.expansion or 8 / 3))
            for spec, kind, reset in zip(levels, self.kinds, resets, strict=True)
        )
        self.shares = nn.Parameter(torch.zeros(len(levels), heads)) if variant == "independent" else None

    def slow_parameters(self) -> dict[str, list[str]]:
        """Names of the parameters of every slow level, its norm's included."""
        names: dict[str, list[str]] = {}
        for i, (spec, kind) in enumerate(zip(self.specs, self.kinds, strict=True)):
            if kind == "slow":
                level = [f"levels.{i}.{name}" for name, _ in self.levels[i].named_parameters()]
                names[spec.name] = [f"norms.{i}.weight", *level]
        return names

    def init_state(self, batch: int, plain: bool = False) -> CMSState:
        """State at the start of a context. `plain` makes ordinary levels fast weights too (see `adapt`)."""
        return CMSState(tuple(level.init_state(batch, plain) for level in self.levels))  # type: ignore[operator]

    def forward(
        self, x: Tensor, state: CMSState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, CMSState]:
        """`x [B, T, D]` → (x plus what the levels add, state). `documents`: those of x, from its start."""
        check_input(x, self.dim, "CMS")
        check_documents(documents, x, state, "CMS")
        after: list[Any] = []
        total = x
        starts = [None] * len(self.levels) if state is None else self._states(state)
        for i, (norm, level, before) in enumerate(zip(self.norms, self.levels, starts, strict=True)):
            y, new = level(norm(x), before, documents)
            after.append(new)
            if self.shares is None:
                x = total = x + y
            else:
                total = total + y * self._share(i, y)
        return total, CMSState(tuple(after))

    def _states(self, state: CMSState) -> tuple[Any, ...]:
        check_kind(state, CMSState, "CMS")
        if len(state.levels) != len(self.levels):
            raise ValueError(f"CMS state must be of {len(self.levels)} levels, got {len(state.levels)}")
        for spec, kind, held in zip(self.specs, self.kinds, state.levels, strict=True):
            if kind == "fast" and held is None:
                raise ValueError(f"CMS state has no weights of level {spec.name!r}, which is fast")
        return state.levels

    def _share(self, level: int, like: Tensor) -> Tensor:
        """Softmax weight of a level for every channel `[D]`."""
        assert self.shares is not None
        share = torch.softmax(self.shares, 0)[level]
        return share.repeat_interleave(like.shape[-1] // share.shape[0]).to(like.dtype)
