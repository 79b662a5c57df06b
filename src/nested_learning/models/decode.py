"""Tokens one at a time on a carried state, as CUDA graphs: a step of a model with memories is thousands of
small kernels, and starting them takes longer than they run.

The shapes of a state repeat every `HopeConfig.cycle` tokens: pending tokens pile up until they are written.
So every token of such a cycle (its *phase*) has a graph of its own. All of them read and write the same
buffers, one for every tensor of a state and as large as it gets: together they hold one state.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from nested_learning.graphs import capture
from nested_learning.state import ModelState

LONGEST = 512
"""Phases of a cycle, at most: every one of them has a graph."""


class Decoder:
    """A model that reads one token at a time, in buffers that stay where they are.

    Steps run as they stand until every phase has been seen, which tells how large the buffers must be. Then a
    phase is captured when it comes, and from its next time on its graph runs. Should a capture fail, such as
    for want of memory, this and all later phases run as they stand, in the same buffers.

    Args:
        model: `logits, state = model(tokens [B, 1], state)`; its parameters stay where they are, and the
            decoder does not keep it alive. Of the counters in its state only the remainder in a cycle may
            matter: graphs go on with those that a phase had when it was first seen.
        cycle: tokens after which the shapes of the state repeat.
    """

    def __init__(self, model: nn.Module, cycle: int) -> None:
        self._model, self.cycle = ref(model), cycle
        self.frames: dict[int, ModelState] = {}  # by phase: states without data
        self.buffers: dict[str, Tensor] = {}  # by names of a state's tensors
        self.steps: dict[int, Callable[[], Tensor]] = {}  # by phase: graphs
        self.capturing = True
        self.state: ModelState | None = None  # while there are no buffers
        self.position, self.phase = 0, 0
        self.token, self.logits = torch.empty(0), torch.empty(0)
        self.pool: Any = None

    def start(self, state: ModelState, token: Tensor) -> None:
        """Go on from `state`; `token [B, 1]`: an example."""
        self.position, self.phase = state.position, state.position % self.cycle
        if self.token.shape != token.shape:
            self.token = token.clone()
        if self.buffers:
            self._keep(state, self.phase)
        else:
            self.state = state

    def __call__(self, token: Tensor) -> Tensor:
        """Logits `[B, 1, V]` after `token [B, 1]`. The next call may write into the same tensor."""
        now, self.phase = self.phase, (self.phase + 1) % self.cycle
        self.position += 1
        if self.state is not None:
            self.frames[now] = self.state.map(lambda t: torch.empty_like(t, device="meta"))
            if len(self.frames) < self.cycle:
                logits, self.state = self._run(token, self.state)
                return logits
            self._allocate(self.state, now)
        self.token.copy_(token)
        if now not in self.steps:
            self.steps[now] = self._capture(now)
        return self.steps[now]()

    def now(self) -> ModelState:
        """The state after all tokens so far, a copy where it is in the buffers."""
        state = self.state or self.held(self.phase).map(Tensor.clone)
        return replace(state, position=self.position)

    def held(self, phase: int) -> ModelState:
        """The state in the buffers, as it is before the step of a phase."""
        frame = self.frames[phase]
        shapes = {name: t.shape for name, t in frame.named_tensors().items()}
        return frame.replace({n: self.buffers[n][: shape.numel()].view(shape) for n, shape in shapes.items()})

    def _run(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        model = self._model()
        assert model is not None, "the model of this decoder is gone"
        logits, after = model(token, state)
        return logits, after

    def _allocate(self, state: ModelState, phase: int) -> None:
        """Make the buffers, and put `state` into them."""
        largest: dict[str, Tensor] = {}
        for frame in self.frames.values():
            for name, t in frame.named_tensors().items():
                if name not in largest or t.numel() > largest[name].numel():
                    largest[name] = t
        device = self.token.device
        self.buffers = {n: torch.empty(t.numel(), dtype=t.dtype, device=device) for n, t in largest.items()}
        self._keep(state, phase)
        self.state = None

    def _capture(self, now: int) -> Callable[[], Tensor]:
        """The step of a phase as a graph, or as it stands where none can be made."""
        before = self.held(now)

        def step() -> Tensor:
            logits, after = self._run(self.token, before)
            self._keep(after, (now + 1) % self.cycle)
            return self.logits.copy_(logits)

        def warm_up() -> None:
            logits, _ = self._run(self.token, before)  # not `step`: it would move the state on
            if self.logits.shape != logits.shape:
                self.logits = torch.empty_like(logits)  # one for all graphs, which would each keep their own

        if not self.capturing:
            return step
        try:
            replay = capture(step, self.token.device, warm_up, self.pool)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graphs from here on: {error}", RuntimeWarning, stacklevel=2)
            self.capturing = False
            warm_up()  # for its buffer, if the first capture failed before
            return step
        self.pool = replay.pool
        return replay

    def _keep(self, state: ModelState, phase: int) -> None:
        """Write a state of `phase` into the buffers. Weights that were not written are there already."""
        new, held = state.named_tensors(), self.held(phase).named_tensors()
        if [(name, t.shape) for name, t in new.items()] != [(name, t.shape) for name, t in held.items()]:
            raise RuntimeError(f"the shapes of the state do not repeat every {self.cycle} tokens")
        own = {buffer.untyped_storage().data_ptr() for buffer in self.buffers.values()}
        moved = [(held[name], t) for name, t in new.items() if not _same(t, held[name])]
        apart = [(to, t.clone() if t.untyped_storage().data_ptr() in own else t) for to, t in moved]
        for to, t in apart:
            to.copy_(t)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are the same memory."""
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


_decoders: WeakKeyDictionary[nn.Module, tuple[Any, Decoder]] = WeakKeyDictionary()


def decoder_of(model: nn.Module, cycle: int, token: Tensor) -> Decoder:
    """The decoder of a model for batches like `token [B, 1]`, kept for the next call.

    A new one is made if the batch has another size, parameters have moved, or autocast or inference mode is
    another. (Outside of inference mode nothing may write to tensors made inside.)
    """
    kind = token.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    modes = autocast, torch.is_inference_mode_enabled()
    key = tuple(token.shape), token.dtype, modes, tuple(p.data_ptr() for p in model.parameters())
    kept = _decoders.get(model)
    if kept is None or kept[0] != key:
        kept = _decoders[model] = key, Decoder(model, cycle)
    return kept[1]


def why_no_decoder(model: nn.Module, mixer: str, cycle: int, device: torch.device) -> str | None:
    """The reason to generate without graphs, or None. `mixer`, `cycle`: of the model's configuration."""
    if device.type != "cuda":
        return f"there are none on {device.type}"
    if "attention" in mixer:
        return f"the cache of {mixer} grows with every token"
    if cycle > LONGEST:
        return f"shapes repeat after {cycle} tokens only, and {LONGEST} is the most"
    if any(type(p) is not nn.Parameter for p in model.parameters()):
        return "parameters are sharded, and gathered in another place at every step"
    return None
