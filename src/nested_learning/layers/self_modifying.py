"""Self-modifying Titans (Eqs. 86–90): memories that write themselves, and the rates they write with.

One chunk:

    k = l2(M_k(x_k)),  v = M_v(x_v),  η = η_max sigmoid(M_η(x)),  α = sigmoid(M_α(x)),  q = l2(x_q)
    v̂_□ = M_□(v)  for □ in {k, v, η, α, memory}                       self-generated targets
    every M_□ is written with keys k and targets v̂_□                   ops/memory_mlp
    y_t = M_memory(q_t)

Reads are those of the weights at the chunk's start (Eq. 90); M_memory may also be read inside the chunk.

Shapes: B batch, T tokens, D model width, H heads, d = D / H, N = B·H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nested_learning.layers.checks import check_heads, check_input, check_kind
from nested_learning.layers.conv import CausalConv, ConvState
from nested_learning.layers.memory import (
    Fast,
    MemoryMLP,
    MemoryState,
    Written,
    rates_from_logits,
    segments,
    solve_write,
    write_memories,
)
from nested_learning.layers.norm import RMSNorm, l2_normalize
from nested_learning.layers.streams import merge_heads, split_heads, split_rates, start_rates
from nested_learning.models.config import READS, MemoryConfig
from nested_learning.ops.memory_mlp.chunk import MLPWeights, mlp_read_inside
from nested_learning.ops.memory_mlp.fused import read
from nested_learning.ops.memory_mlp.stack import Stack
from nested_learning.ops.self_modifying.chunk import Plan
from nested_learning.ops.self_modifying.scan import Setting, Stream, scan
from nested_learning.state import State

Memories = dict[str, Fast]
RATES = (
    "eta",
    "alpha",
)  # memories of width 1 with P = 0: their P x is a slow projection of the block's input


@dataclass(frozen=True)
class SelfModState(State):
    """State of `SelfModifyingTitans`.

    `memories`: fast weights, in the order of `layer.memories`. `pending`: what the unfinished chunk will
    write, `[B, H, n, …]`; None at a boundary. `position`: tokens since a boundary of the larger chunk.
    `chunks`: names of the memories, and tokens between two writes of each.
    """

    memories: tuple[MemoryState, ...]
    conv: ConvState
    pending: tuple[Tensor | None, ...] | None
    position: int
    chunks: tuple[tuple[str, int], ...]


class Streams(NamedTuple):
    """Slow projections of the input: unit `k, v, q [N, T, d]` and the slow logits `rates [G, N, T]`."""

    k: Tensor
    v: Tensor
    q: Tensor
    rates: Tensor

    def split(self, lengths: list[int]) -> list[Streams]:
        """Consecutive runs of tokens. (One split: the gradient of a slice is as long as the sequence.)"""
        k, v, q = (torch.split(t, lengths, 1) for t in self[:3])
        return [Streams(*four) for four in zip(k, v, q, torch.split(self.rates, lengths, 2), strict=True)]


class Progress(NamedTuple):
    """Where a sequence stands: memories, the tokens of the unfinished chunk, tokens since a boundary."""

    memories: Memories
    pending: Written | None
    position: int


class SelfModifyingTitans(nn.Module):
    """A sequence mixer whose key, value and rate projections are memories that rewrite themselves.

    Args:
        dim: model width D.
        num_heads: heads H; each has its own memories of width D / H.
        chunk_size: tokens between two writes of M_memory.
        read: "chunk" (Eq. 90), "before_write" (Eq. 86) or "after_write" (Titans).
        config: how memories are written; see `MemoryConfig`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        chunk_size: int = 64,
        read: str = "chunk",
        config: MemoryConfig | None = None,
    ) -> None:
        super().__init__()
        self._check_sizes(dim, num_heads, chunk_size, read, config or MemoryConfig())
        self.config = config = config or MemoryConfig()
        self.heads, self.read = num_heads, read
        width = dim // num_heads
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = CausalConv(3 * dim, config.conv_window)
        self.rates = nn.Linear(dim, (3 if config.momentum else 2) * num_heads)
        names = ("memory", *config.adaptive)
        self.memories = nn.ModuleDict(
            {
                name: MemoryMLP(num_heads, width, config.hidden or width, 1 if name in RATES else width)
                for name in names
            }
        )
        others = config.projection_chunk_size or chunk_size
        self.chunks = {name: chunk_size if name == "memory" else others for name in names}
        start_rates(self.rates, num_heads, config.step_bias(max(self.chunks.values())), config.alpha_bias)
        self.norm = RMSNorm(width)
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

    def init_state(self, batch: int) -> SelfModState:
        """State at the start of a context."""
        memories = tuple(MemoryState.pack(fast, batch) for fast in self._start(batch).values())
        return SelfModState(memories, self.conv.init_state(batch), None, 0, tuple(self.chunks.items()))

    def forward(self, x: Tensor, state: SelfModState | None = None) -> tuple[Tensor, SelfModState]:
        """`x [B, T, D]` → (`y [B, T, D]`, state). Any split of a sequence gives the same answers."""
        check_input(x, self.out.in_features, type(self).__name__)
        if state is not None:
            self._check_state(state, x)
        batch, tokens, _ = x.shape
        padded, conv = self.conv.pad(self.project(x), None if state is None else state.conv)
        logits = split_rates(self.rates(x), self.heads)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        memories = self._start(batch) if state is None else self._unpack(state)
        pending = None if state is None else Written.unpack(state.pending)
        progress = Progress(memories, pending, 0 if state is None else state.position)
        answers: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):  # fast weights stay in float32
            runs = self._runs(tokens, progress.position)
            for (_, whole), stream in zip(runs, self._cut(padded, logits, runs), strict=True):
                answer, progress = (self._scan if whole else self._walk)(progress, stream)
                answers.append(answer)
        y = merge_heads(torch.cat(answers, 1) if len(answers) > 1 else answers[0], batch).to(x.dtype)
        y = self.out(self.norm(y).flatten(2))
        packed = tuple(MemoryState.pack(fast, batch) for fast in progress.memories.values())
        pending_state = None if progress.pending is None else progress.pending.pack(batch)
        chunks = tuple(self.chunks.items())
        return y, SelfModState(packed, conv, pending_state, progress.position, chunks)

    def _check_state(self, state: SelfModState, x: Tensor) -> None:
        owner = type(self).__name__
        check_kind(state, SelfModState, owner)
        if dict(state.chunks) != self.chunks:
            raise ValueError(
                f"{owner} state must be of memories with chunk sizes {self.chunks}, got {dict(state.chunks)}"
            )
        for name, memory in zip(self.chunks, state.memories, strict=True):
            self._memory(name).check_state(memory, self.config.momentum, x, owner)

    def _cut(self, padded: Tensor, logits: Tensor, runs: list[tuple[int, bool]]) -> list[Stream]:
        """The part of every run; the convolution of each begins with the inputs before it."""
        weight = self.conv.weight.to(padded.dtype)
        if len(runs) == 1:
            return [Stream(padded, weight, logits)]
        streams, done, past = [], 0, weight.shape[1] - 1
        for length, _ in runs:
            end = done + length
            streams.append(Stream(padded[:, done : end + past], weight, logits[:, :, done:end]))
            done = end
        return streams

    @property
    def plan(self) -> Plan | None:
        """How whole chunks run through `scan`; None where an option is on that it does not have."""
        return _plan(self.config, self.chunks, self.read)

    def _runs(self, tokens: int, position: int) -> list[tuple[int, bool]]:
        """How many tokens to walk through, and how many to scan as whole chunks (True), in order."""
        if self.plan is None:
            return [(tokens, False)]
        chunk = self.chunks["memory"]
        first = min(-position % chunk, tokens)
        whole = (tokens - first) // chunk * chunk
        runs = [(first, False), (whole, True), (tokens - first - whole, False)]
        return [run for run in runs if run[0]]

    def _scan(self, at: Progress, stream: Stream) -> tuple[Tensor, Progress]:
        """Whole chunks from a boundary on, by `ops/self_modifying`."""
        plan = self.plan
        assert plan is not None
        names = (*plan.full, *plan.rates)
        weights = [at.memories[name].weights for name in names]
        full = len(plan.full)
        w1 = torch.stack([w.w1 for w in weights[:full]])
        w2 = torch.stack([w.w2 for w in weights])
        gate = torch.stack([w.w1 for w in weights[full:]]) if weights[full:] else w1[:0, :, :1]
        how = Setting(plan, self.heads, self.chunks["memory"], self.config.keep_every)
        answers, after = scan(stream, Stack(w2, w1, gate), how)
        second = [*after.w1, *after.gate]
        new = {name: Fast(MLPWeights(second[i], after.w2[i])) for i, name in enumerate(names)}
        return answers, Progress({name: new[name] for name in at.memories}, None, 0)

    def _walk(self, at: Progress, stream: Stream) -> tuple[Tensor, Progress]:
        """Any number of tokens, chunk by chunk, with all options."""
        memories, pending, position = at
        k, v, q = l2_normalize(split_heads(self.conv.convolve(stream.padded), self.heads))
        streams = Streams(k, v, q, stream.rates)
        answers, rounds = [], 0
        lengths = segments(streams.k.shape[1], position, min(self.chunks.values()))
        for part in streams.split(lengths):
            queries, new = self._project(memories, part)
            pending = new if pending is None else pending.join(new)
            position += queries.shape[1]
            answer, memories = self._answer_and_write(memories, queries, pending, position)
            answers.append(answer)
            if position == max(self.chunks.values()):
                position, pending, rounds = 0, None, rounds + 1
                memories = self._truncate(memories, rounds)
        return torch.cat(answers, 1), Progress(memories, pending, position)

    def _memory(self, name: str) -> MemoryMLP:
        memory = self.memories[name]
        assert isinstance(memory, MemoryMLP)
        return memory

    def _start(self, batch: int) -> Memories:
        return {name: self._memory(name).start(batch, self.config.momentum) for name in self.chunks}

    def _unpack(self, state: SelfModState) -> Memories:
        return {name: fast.unpack() for name, fast in zip(self.chunks, state.memories, strict=True)}

    def _truncate(self, memories: Memories, rounds: int) -> Memories:
        every = self.config.truncate_every
        if every is None or rounds % every:
            return memories
        return {name: fast.detach() for name, fast in memories.items()}

    def _project(self, memories: Memories, x: Streams) -> tuple[Tensor, Written]:
        """Queries `[N, n, d]`, and the keys, values and rates that the tokens will write."""
        added: dict[str, Tensor] = {}
        for names, at in ((("k", *RATES), x.k), (("v",), x.v), (("q",), x.q)):
            added.update(_recall([name for name in names if name in memories], memories, at))
        k = l2_normalize(x.k + added["k"]) if "k" in added else x.k
        q = l2_normalize(x.q + added["q"]) if "q" in added else x.q
        v = x.v + added["v"] if "v" in added else x.v
        logits = list(x.rates)
        for i, name in enumerate(RATES):
            if name in added:
                logits[i] = logits[i] + added[name].squeeze(-1)
        return q, Written(k, v, *rates_from_logits(logits, self.config, max(self.chunks.values())))

    def _answer_and_write(
        self, memories: Memories, queries: Tensor, pending: Written, position: int
    ) -> tuple[Tensor, Memories]:
        """M_memory's answers to the newest tokens, and the memories after the writes that are now due."""
        answer = queries + self._answer(memories, queries, pending, position)
        after = dict(memories)
        for chunk in set(self.chunks.values()):
            if position % chunk == 0:
                names = [name for name in memories if self.chunks[name] == chunk]
                tokens, chosen = pending.last(chunk), [memories[name] for name in names]
                residuals = self._residuals(names, memories, tokens)
                initial = [self._initial(name, queries) for name in names]
                new = write_memories(tokens, residuals, chosen, self.config, initial)
                after.update(zip(names, new, strict=True))
        return answer, after

    def _answer(self, memories: Memories, queries: Tensor, pending: Written, position: int) -> Tensor:
        memory = memories["memory"]
        if self.read == "chunk":
            return read(memory.weights, queries)
        tokens = pending.last((position - 1) % self.chunks["memory"] + 1)
        initial = self._initial("memory", queries)
        (residual,) = self._residuals(["memory"], memories, tokens)
        written = solve_write(tokens, residual, memory, self.config, initial)
        return mlp_read_inside(written, memory.weights, memory.momentum, queries, self.read, initial)

    def _residuals(self, names: list[str], memories: Memories, tokens: Written) -> list[Tensor]:
        """P k − v̂ of each memory, with its own target v̂ = M(v) or the plain target v."""
        own = [name for name in names if self.config.self_targets or name in RATES]
        targets = _recall(own, memories, tokens.v)
        skip = tokens.k - tokens.v
        residuals = []
        for name in names:
            if name not in targets:
                residuals.append(skip)
                continue
            target = targets[name].detach() if self.config.stop_gradient_targets else targets[name]
            residuals.append(-target if name in RATES else skip - target)
        return residuals

    def _initial(self, name: str, like: Tensor) -> MLPWeights | None:
        if not self.config.retention or self.config.retention_target == "zero":
            return None
        return self._memory(name).initial(like.shape[0] // self.heads)


def _plan(config: MemoryConfig, chunks: dict[str, int], read: str) -> Plan | None:
    others = config.momentum or config.truncate_every or not config.delta or read != "chunk"
    towards = config.retention and config.retention_target == "init"
    if others or towards or len(set(chunks.values())) > 1:
        return None
    full = tuple(name for name in chunks if name not in RATES)
    rates = tuple(name for name in RATES if name in chunks)
    limit = config.step_limit(max(chunks.values()))
    return Plan(full, rates, limit, config.retention, config.self_targets, config.stop_gradient_targets)


def _recall(names: list[str], memories: Memories, at: Tensor) -> dict[str, Tensor]:
    """W₁σ̂(W₂x) of the named memories at `at [N, n, d]`."""
    return {name: read(memories[name].weights, at) for name in names}
