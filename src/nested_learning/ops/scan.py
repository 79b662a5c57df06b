"""A loop over pieces of a sequence that carries state: compiled where asked, recomputed where asked.

One compiled function serves all pieces of one shape, so the loop itself stays outside of any graph: a graph
of the whole loop would unroll it and take minutes to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Step = Callable[..., tuple[Any, Any]]
Runner = Callable[[Step, tuple[Any, ...], Any, Any], tuple[Any, Any]]
"""Runs a step: `run_eager` or `run_compiled`."""


class Piece(NamedTuple):
    """A run of tokens: `x` in tensors and constants, and how its step runs, see `scan`."""

    x: Any
    compiled: bool = False
    recompute: bool = False


def scan(step: Step, how: tuple[Any, ...], carried: Any, pieces: Sequence[Piece]) -> tuple[list[Tensor], Any]:
    """Run `y, carried = step(*how, carried, x)` over the pieces of a sequence.

    A piece runs eagerly and stores what its backward pass needs; or with `recompute` stores its inputs only
    and runs again then (torch's activation checkpointing); or with `compiled` does the same in two graphs,
    one of them for the recomputation and the backward pass together.

    Args:
        step: a pure function of tensors, in nested tuples, and of constants.
        how: constants.
        carried: state before the first piece.

    Returns:
        every piece's y, and the state after the last.
    """
    if torch.compiler.is_exporting():  # torch.export refuses what is marked, and unrolls the loop
        return _scan(step, how, carried, pieces)
    found: tuple[list[Tensor], Any] = _scan_in_python(step, how, carried, pieces)
    return found


def _scan(
    step: Step, how: tuple[Any, ...], carried: Any, pieces: Sequence[Piece]
) -> tuple[list[Tensor], Any]:
    answers = []
    for piece in pieces:
        run = run_compiled if piece.compiled else run_eager
        if piece.recompute and torch.is_grad_enabled():
            y, carried = checkpoint(
                run, step, how, carried, piece.x, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, carried = run(step, how, carried, piece.x)
        answers.append(y)
    return answers, carried


_scan_in_python = torch.compiler.disable(_scan, recursive=False)  # type: ignore[no-untyped-call]


def run_eager(step: Step, how: tuple[Any, ...], carried: Any, x: Any) -> tuple[Any, Any]:
    """`step` as it stands."""
    return step(*how, carried, x)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through `torch.compile`: a graph for every set of shapes, shared by a process's layers."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def run_compiled(step: Step, how: tuple[Any, ...], carried: Any, x: Any) -> tuple[Any, Any]:
    """`step` as one graph, or as two of them under automatic differentiation."""
    if not torch.is_grad_enabled():
        y, carried = compiled(step)(*how, carried, x)
        return y, carried
    tensors: list[Tensor] = []
    frame = take_apart((carried, x), tensors)
    made: list[Any] = []  # filled by the call: the frame of the result
    results = _Compiled.apply(step, how, frame, made, *tensors)  # type: ignore[no-untyped-call]
    y, carried = put_together(made[0], iter(results))
    return y, carried


PLACE = "tensor"
"""Stands in a frame where a tensor was."""


def take_apart(value: Any, tensors: list[Tensor]) -> Any:
    """The frame of nested tuples, with `PLACE` for every tensor; the tensors are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return PLACE
    if not isinstance(value, tuple):
        return value
    parts = [take_apart(part, tensors) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def put_together(frame: Any, tensors: Iterator[Tensor]) -> Any:
    """Inverse of `take_apart`."""
    if isinstance(frame, tuple):
        parts = [put_together(part, tensors) for part in frame]
        return type(frame)(*parts) if hasattr(frame, "_fields") else tuple(parts)
    return next(tensors) if isinstance(frame, str) and frame == PLACE else frame


class _Compiled(torch.autograd.Function):
    """One step as a graph that stores nothing, and a graph that runs it again with its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, how: tuple[Any, ...], frame: Any, made: list[Any], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        plain = (tensor.detach() for tensor in tensors)  # as in evaluation: one graph serves both
        results: list[Tensor] = []
        made.append(take_apart(compiled(step)(*how, *put_together(frame, plain)), results))
        ctx.step, ctx.how, ctx.frame = step, how, frame
        ctx.save_for_backward(*tensors)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = tuple(tensor.detach() for tensor in ctx.saved_tensors)
        with torch.autocast(tensors[0].device.type, enabled=False):
            found = compiled(pull_back)(ctx.step, ctx.how, ctx.frame, tensors, gradients)
        return None, None, None, None, *found


def pull_back(
    step: Step, how: tuple[Any, ...], frame: Any, tensors: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients at the `tensors` of carried state and piece, from those at the result's tensors."""

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        take_apart(step(*how, *put_together(frame, iter(tensors))), results)
        return tuple(results)

    back = torch.func.vjp(outputs, *tensors)[1]
    found: tuple[Tensor, ...] = back(gradients)
    return found
