"""Steps on a GPU as CUDA graphs: of the trainer, and of small models in experiments.

A step of a model with memories starts thousands of small kernels, one after the other. A graph starts them
all at once. It is made for one shape of batch, and for parameters that stay where they are.

Shapes: B batch, b its rows in one micro-batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning.graphs import WARM_UP, Replay, capture

SHAPES = 8
"""Shapes of batches that get a graph in one run. A curriculum has a few; sorted lengths may have dozens."""
Batch = tuple[Tensor, Tensor]


class MicroSteps:
    """The forward and backward pass of micro-batches, with a CUDA graph for every shape that comes.

    `begin` clears the gradients; then every call adds those of one micro-batch. Graphs write gradients to
    buffers that stay where they are, one for every parameter. As in eager steps, a parameter that a batch
    does not reach has no gradient (None), and an optimizer leaves it alone.

    Args:
        model: on a CUDA device. Its parameters stay where they are, and nothing in it is random.
        step: `step(tokens [b, T+1], count)` adds the gradients of a micro-batch and returns its loss,
            detached. `count`, the number of targets of the whole step, is an integer, or in a graph a
            scalar int64 on the device.
        tell: called with a line when a shape is captured, and when one runs without a graph.
    """

    def __init__(
        self, model: nn.Module, step: Callable[[Tensor, int | Tensor], Tensor], tell: Callable[[str], None]
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.step, self.tell = step, tell
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)
        self.graphs: dict[torch.Size, _Graph] = {}
        self.buffers: dict[nn.Parameter, Tensor] = {}
        self.pool: Any = None
        self.told = False

    def begin(self, example: Tensor) -> None:
        """Start a step of micro-batches like `example [b, T+1]`: no gradients. A new shape is captured."""
        graph = self.graphs.get(example.shape)
        if graph is None and len(self.graphs) < SHAPES:
            graph = self.graphs[example.shape] = self._capture(example)
        if graph is None and not self.told:
            self.told = True
            rows, length = example.shape
            self.tell(f"no CUDA graph for batches of {rows} x {length - 1} tokens: {SHAPES} shapes have one")
        self._attach([] if graph is None else graph.reached)

    def __call__(self, tokens: Tensor, count: int) -> Tensor:
        """Add the gradients of `tokens [b, T+1]`, on any device; their loss, until the next call."""
        graph = self.graphs.get(tokens.shape)
        self.count.fill_(count)
        if graph is None:
            return self.step(tokens, self.count)  # with the arithmetic of a graph
        graph.tokens.copy_(tokens, non_blocking=True)
        return graph.replay()

    def _attach(self, reached: list[nn.Parameter]) -> None:
        """Give the parameters in `reached` their buffers, set to zero, and no other one a gradient."""
        for parameter in self.parameters:
            parameter.grad = None
        for parameter in reached:
            parameter.grad = self.buffers[parameter]
        if reached:
            torch._foreach_zero_([self.buffers[parameter] for parameter in reached])

    def _capture(self, example: Tensor) -> _Graph:
        began = time.perf_counter()
        tokens = example.to(self.device, copy=True)
        self.count.fill_(example.numel())
        reached: list[nn.Parameter] = []

        def warm_up() -> None:
            self._attach([])
            for _ in range(WARM_UP):
                self.step(tokens, self.count)
            for parameter in self.parameters:
                if parameter.grad is not None:
                    reached.append(parameter)
                    if parameter not in self.buffers:  # torch's own gradients may share memory
                        self.buffers[parameter] = torch.zeros_like(parameter)
            self._attach(reached)  # a capture adds to gradients that are there, where they are

        try:
            replay = capture(lambda: self.step(tokens, self.count), self.device, warm_up, self.pool)
        except RuntimeError as error:
            error.add_note("in the capture of a training step; train.graphs=false trains without")
            raise
        self.pool = replay.pool
        rows, length = example.shape
        seconds = time.perf_counter() - began
        self.tell(f"a CUDA graph of steps on {rows} x {length - 1} tokens was made in {seconds:.0f} s")
        return _Graph(tokens, replay, reached)


@dataclass(frozen=True, slots=True)
class _Graph:
    """The graph of one shape: what it reads, and the parameters whose gradients it adds to."""

    tokens: Tensor
    replay: Replay
    reached: list[nn.Parameter]


class CapturedStep:
    """loss(inputs, targets) and its backward pass, captured at the first batch.

    Gradients are in the same tensors after every call; the optimizer must leave them there.

    Args:
        model: on a CUDA device.
        loss: a scalar from inputs and targets on that device.
        example: a batch of the shape that all have.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], example: Batch) -> None:
        device = next(model.parameters()).device
        self.inputs, self.targets = (t.to(device).clone() for t in example)

        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            value = loss(self.inputs, self.targets)
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()

        self.replay = capture(step, device)

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of a batch; its gradients are in the parameters."""
        for held, new in zip((self.inputs, self.targets), batch, strict=True):
            if held.shape != new.shape:
                raise ValueError(f"batches must have one shape, {tuple(held.shape)}, got {tuple(new.shape)}")
            held.copy_(new, non_blocking=True)
        return self.replay()


class CapturedForward(nn.Module):
    """model(tokens) from the start of a context, captured once for every shape.

    Takes tokens on any device and hands logits back there; there is no state.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graphs: dict[tuple[int, ...], tuple[Replay, Tensor]] = {}

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """`tokens [B, T]` → (`logits [B, T, V]`, None). The next call writes into the same logits."""
        key = tuple(tokens.shape)
        if key not in self.graphs:
            device = next(self.model.parameters()).device
            held = tokens.to(device).clone()
            self.graphs[key] = capture(lambda: self.model(held)[0], device), held
        replay, held = self.graphs[key]
        held.copy_(tokens)
        return replay().to(tokens.device), None
