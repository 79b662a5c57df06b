"""Tokens one at a time on a carried state, as CUDA graphs: a step of a model with memories is thousands of
small kernels, and starting them takes longer than they run.

The shapes of a state repeat every `HopeConfig.alignment` tokens: pending tokens pile up until they are
written. So every token of such a cycle (its *phase*) has a graph of its own, which reads the buffers of its
state and writes those of the next phase. Phases between two writes share the buffers of their fast weights.

The graphs have run in tests that replace their capture, but not on a card.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nested_learning.graphs import Replay, capture
from nested_learning.state import ModelState

LONGEST = 512
"""Phases of a cycle, at most: every one of them has a graph."""
log = logging.getLogger(__name__)


class Decoder:
    """A model that reads one token at a time, in buffers that stay where they are.

    The first time round the cycle runs as it stands and makes the buffers; the second time every phase is
    captured; from then on graphs run.

    Args:
        model: `logits, state = model(tokens [B, 1], state)`; its parameters stay where they are.
        cycle: tokens after which the shapes of the state repeat.
    """

    def __init__(self, model: nn.Module, cycle: int) -> None:
        self.model, self.cycle = model, cycle
        self.states: dict[int, ModelState] = {}
        self.graphs: dict[int, Replay] = {}
        self.phase, self.token, self.pool = 0, torch.empty(0), None

    def start(self, state: ModelState, token: Tensor) -> None:
        """Go on from `state`; `token [B, 1]`: an example."""
        self.phase = state.position % self.cycle
        if self.token.shape != token.shape:
            self.token = token.clone()
        if self.phase in self.states:
            _copy(state, self.states[self.phase])
        else:
            self.states[self.phase] = state.map(torch.clone)

    def __call__(self, token: Tensor) -> Tensor:
        """Logits `[B, 1, V]` after `token [B, 1]`. The next call may write into them."""
        self.token.copy_(token)
        now, after = self.phase, (self.phase + 1) % self.cycle
        self.phase = after
        if now in self.graphs:
            return self.graphs[now]()
        if after in self.states:
            replay = self.graphs[now] = capture(lambda: self._run(now, after), token.device, pool=self.pool)
            self.pool = replay.pool
            return replay()
        logits: Tensor
        logits, state = self.model(self.token, self.states[now])
        held = {(tensor.data_ptr(), tensor.shape): tensor for tensor in self.states[now].tensors()}

        def keep(new: Tensor) -> Tensor:
            same = held.get((new.data_ptr(), new.shape))
            return new.clone() if same is None else same

        self.states[after] = state.map(keep)
        return logits

    def _run(self, now: int, after: int) -> Tensor:
        logits: Tensor
        logits, state = self.model(self.token, self.states[now])
        _copy(state, self.states[after])
        return logits


def _copy(new: ModelState, held: ModelState) -> None:
    """Write the tensors of a state into the buffers of another, but those that are the same memory."""
    for one, buffer in zip(new.tensors(), held.tensors(), strict=True):
        if one.data_ptr() != buffer.data_ptr():
            buffer.copy_(one)


_decoders: WeakKeyDictionary[nn.Module, tuple[Any, Decoder]] = WeakKeyDictionary()


def decoder_of(model: nn.Module, cycle: int, token: Tensor) -> Decoder:
    """The decoder of a model for batches like `token [B, 1]`, kept for the next call.

    A new one is made if the batch has another size, or parameters have moved.
    """
    kind = token.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    key = tuple(token.shape), autocast, tuple(p.data_ptr() for p in model.parameters())
    kept = _decoders.get(model)
    if kept is None or kept[0] != key:
        kept = _decoders[model] = key, Decoder(model, cycle)
    return kept[1]


def why_no_decoder(mixer: str, cycle: int, device: torch.device) -> str | None:
    """The reason to generate without graphs, or None."""
    if device.type != "cuda":
        return f"there are none on {device.type}"
    if "attention" in mixer:
        return f"the cache of {mixer} grows with every token"
    if cycle > LONGEST:
        return f"shapes repeat after {cycle} tokens only, and {LONGEST} is the most"
    return None
