"""Self-modifying Titans with linear memories: five matrices that rewrite themselves through one gain.

The module holds the slow projections and the initial memories; the equations are in
`ops/self_modifying_linear/chunk.py`.

Shapes: B batch, T tokens, D model width, H heads, d = D / H, N = B·H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nested_learning.layers.checks import check_heads, check_held, check_input, check_kind, widened
from nested_learning.layers.config import READS, Around, MemoryConfig
from nested_learning.layers.conv import CausalConv, ConvState
from nested_learning.layers.documents import Documents, read_apart
from nested_learning.layers.norm import RMSNorm
from nested_learning.layers.streams import (
    gate_output,
    make_gate,
    merge_heads,
    project_streams,
    start_rates,
)
from nested_learning.ops.delta_rule.chunk import LinearMemory
from nested_learning.ops.memory_mlp.chunk import WriteTokens, chunk_limit
from nested_learning.ops.scan import Piece, scan
from nested_learning.ops.segments import segments
from nested_learning.ops.self_modifying.chunk import MEMORY, RATES, Streams
from nested_learning.ops.self_modifying_linear.chunk import GainPiece, GainProgress, Starts, read_and_write
from nested_learning.state import State

AROUND = Around()
ETA_START = 1 / 128  # the step size at the start of training


@dataclass(frozen=True)
class SelfModLinearState(State):
    """State of `SelfModifyingLinear`.

    Args:
        gain: Γ `[B, H, d, d]`; every memory is its initial weights times Γ.
        momentum: of Γ (None without).
        conv: of the causal convolution.
        pending: what the unfinished chunk will write, `[B, H, n, …]`; None at a boundary.
        position: tokens since a boundary.
        chunk_size: tokens between two writes.
    """

    gain: Tensor
    momentum: Tensor | None
    conv: ConvState
    pending: tuple[Tensor | None, ...] | None
    position: int
    chunk_size: int


class SelfModifyingLinear(nn.Module):
    """`SelfModifyingTitans` with a matrix in the place of every two-layer memory, and without their P x.

    Args:
        dim: model width D.
        num_heads: heads H; each has its own memories of width D / H.
        chunk_size: tokens between two writes.
        read: "chunk" (Eq. 90), "before_write" (Eq. 86) or "after_write" (Titans).
        config: how memories are written. Targets are self-made, and all memories have the same chunk: without
            either they would not share a gain.
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
        owner = type(self).__name__
        check_heads(dim, num_heads, owner)
        if read not in READS:
            raise ValueError(f"{owner} read must be one of {', '.join(READS)}, got {read!r}")
        if chunk_size < 1:
            raise ValueError(f"{owner} chunk_size must be at least 1, got {chunk_size}")
        self.config = config = config or MemoryConfig()
        self.heads, self.chunk_size, self.read = num_heads, chunk_size, read
        self.around, self.compiled = around, False
        width = dim // num_heads
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = CausalConv(3 * dim, around.conv_window)
        self.rates = nn.Linear(dim, (3 if config.momentum else 2) * num_heads)
        eta_bias = config.step_bias(ETA_START, config.step_limit(chunk_limit(chunk_size)))
        start_rates(self.rates, num_heads, eta_bias, config.alpha_bias)
        self.memories = nn.ParameterDict(
            {f"initial_{name}": _initial(name, num_heads, width) for name in (MEMORY, *config.adaptive)}
        )
        self.norm = RMSNorm(width)
        self.gate = make_gate(dim, around)
        self.out = nn.Linear(dim, dim, bias=False)

    def init_state(self, batch: int) -> SelfModLinearState:
        """State at the start of a context: the gain is the identity."""
        return self._pack(self._start(batch), self.conv.init_state(batch), batch, 0)

    def forward(
        self, x: Tensor, state: SelfModLinearState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, SelfModLinearState]:
        """`x [B, T, D]` → (`y [B, T, D]`, state). Any split of a sequence gives the same answers.

        `documents`: those of x, each processed as if it were alone in a row; only without a state.
        """
        check_input(x, self.out.in_features, type(self).__name__)
        if documents is not None:
            return read_apart(self, x, state, documents)
        if state is not None:
            self._check_state(state, x)
        batch, tokens, _ = x.shape
        position = 0 if state is None else state.position
        streams, conv = self.streams(x, None if state is None else state.conv)
        with torch.autocast(x.device.type, enabled=False):  # the gain stays in float32
            at = self._start(batch) if state is None else self.unpack(state)
            how = (self.config, self.chunk_size, self.read)
            answers, at = scan(read_and_write, how, at, self._pieces(streams, position))
            y = torch.cat(answers, 1) if len(answers) > 1 else answers[0]
            y = merge_heads(y @ self._weights(batch, MEMORY).mT, batch).to(x.dtype)
        after = self._pack(at, conv, batch, (position + tokens) % self.chunk_size)
        return self.out(gate_output(self.gate, self.norm(y).flatten(2), x)), after

    def streams(self, x: Tensor, conv: ConvState | None) -> tuple[Streams, ConvState]:
        """Slow projections of `x [B, T, D]`, and the state of the convolution (None: a start)."""
        return project_streams(self, x, conv)

    def _pieces(self, x: Streams, position: int) -> list[Piece]:
        """The tokens chunk by chunk."""
        lengths, pieces = segments(x.k.shape[1], position, self.chunk_size), []
        for part, length in zip(x.split(lengths), lengths, strict=True):
            position += length
            whole = length == self.chunk_size
            piece = GainPiece(part, position % self.chunk_size == 0)
            pieces.append(Piece(piece, self.compiled and whole, self.config.keep_every is not None))
        return pieces

    def _weights(self, batch: int, *names: str) -> Tensor:
        """Initial weights of some memories on one another, `[B·H, rows, d]`, in float32 at least."""
        found = [self.memories[f"initial_{name}"] for name in names]
        return torch.cat([p.to(widened(p)) for p in found], 1).repeat(batch, 1, 1)

    def _starts(self, batch: int) -> Starts:
        adaptive = self.config.adaptive
        groups = (("k", *RATES), ("v",), ("q",))
        kept = [[name for name in group if name in adaptive] for group in groups]
        return Starts(*(self._weights(batch, *names) if names else None for names in kept))

    def _identity(self, batch: int) -> Tensor:
        like = self.out.weight
        width = like.shape[0] // self.heads
        one = torch.eye(width, dtype=widened(like), device=like.device)
        return one.repeat(batch * self.heads, 1, 1)

    def _memory(self, gain: Tensor, momentum: Tensor | None, batch: int) -> LinearMemory:
        return LinearMemory(gain, momentum, self._identity(batch) if self.config.to_initial else None)

    def _start(self, batch: int) -> GainProgress:
        gain = self._identity(batch)
        momentum = torch.zeros_like(gain) if self.config.momentum else None
        return GainProgress(self._memory(gain, momentum, batch), self._starts(batch), None)

    def unpack(self, state: SelfModLinearState) -> GainProgress:
        """Where the sequences of a state stand, with batch and heads as one dimension."""
        batch = state.gain.shape[0]
        momentum = None if state.momentum is None else state.momentum.flatten(0, 1)
        pending = state.pending
        if pending is not None:
            pending = WriteTokens(*(None if t is None else t.flatten(0, 1) for t in pending))  # type: ignore[arg-type]
        gain = self._memory(state.gain.flatten(0, 1), momentum, batch)
        return GainProgress(gain, self._starts(batch), pending)

    def _pack(self, at: GainProgress, conv: ConvState, batch: int, position: int) -> SelfModLinearState:
        def whole(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.view(batch, -1, *t.shape[1:])

        gain = at.gain.weights.view(batch, -1, *at.gain.weights.shape[1:])
        pending = None if at.pending is None else tuple(whole(t) for t in at.pending)
        return SelfModLinearState(gain, whole(at.gain.momentum), conv, pending, position, self.chunk_size)

    def _check_state(self, state: SelfModLinearState, x: Tensor) -> None:
        owner = type(self).__name__
        check_kind(state, SelfModLinearState, owner)
        if state.chunk_size != self.chunk_size:
            raise ValueError(
                f"{owner} state must be of chunk size {self.chunk_size}, got one of {state.chunk_size}"
            )
        if (state.momentum is not None) != self.config.momentum:
            raise ValueError(f"{owner} state must be {'with' if self.config.momentum else 'without'} momenta")
        width = self.out.in_features // self.heads
        for held in (state.gain, *([] if state.momentum is None else [state.momentum])):
            check_held(held, (self.heads, width, width), x, owner, widened(self.out.weight))


def _initial(name: str, heads: int, width: int) -> nn.Parameter:
    """A memory before the first token: the identity, or zero for a rate, `[H, o, d]`."""
    if name in RATES:
        return nn.Parameter(torch.zeros(heads, 1, width))
    return nn.Parameter(torch.eye(width).repeat(heads, 1, 1))
