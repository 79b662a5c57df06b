"""Small models on a GPU: one step, or one forward pass, as a CUDA graph.

A step of a model with memories starts thousands of small kernels, one after the other. A graph starts them
all at once. It is made for one shape of batch, and for parameters that stay where they are.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3
"""Runs before a capture, in which libraries set up what they keep."""
Batch = tuple[Tensor, Tensor]


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

        self.graph, self.loss = _capture(step)

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of a batch; its gradients are in the parameters."""
        for held, new in zip((self.inputs, self.targets), batch, strict=True):
            if held.shape != new.shape:
                raise ValueError(f"batches must have one shape, {tuple(held.shape)}, got {tuple(new.shape)}")
            held.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.loss


class CapturedForward(nn.Module):
    """model(tokens) from the start of a context, captured once for every shape.

    Takes tokens on any device and hands logits back there; there is no state.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graphs: dict[tuple[int, ...], tuple[Any, Tensor, Tensor]] = {}

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """`tokens [B, T]` → (`logits [B, T, V]`, None). The next call writes into the same logits."""
        key = tuple(tokens.shape)
        if key not in self.graphs:
            held = tokens.to(next(self.model.parameters()).device).clone()
            graph, logits = _capture(lambda: self.model(held)[0])
            self.graphs[key] = graph, held, logits
        graph, held, logits = self.graphs[key]
        held.copy_(tokens)
        graph.replay()
        return logits.to(tokens.device), None


def _capture(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of `run`, and the tensor that a replay writes its result to."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result
