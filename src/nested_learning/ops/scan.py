"""A loop over pieces of a sequence that carries state: compiled where asked, recomputed where asked.

One compiled function serves all pieces of one shape, so the loop itself stays outside of any graph: a graph
of the whole loop would unroll it and take minutes to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

Step = Callable[..., tuple[Tensor, Any]]


class Piece(NamedTuple):
    """A run of tokens: `x` in tensors and constants, and how its step runs, see `scan`."""

    x: Any
    compiled: bool = False
    recompute: bool = False


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
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
    answers = []
    for piece in pieces:
        run = _run_compiled if piece.compiled else _run
        if piece.recompute and torch.is_grad_enabled():
            y, carried = checkpoint(
                run, step, how, carried, piece.x, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, carried = run(step, how, carried, piece.x)
        answers.append(y)
    return answers, carried


def _run(step: Step, how: tuple[Any, ...], carried: Any, x: Any) -> tuple[Tensor, Any]:
    return step(*how, carried, x)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through `torch.compile`: a graph for every set of shapes, shared by a process's layers."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def _run_compiled(step: Step, how: tuple[Any, ...], carried: Any, x: Any) -> tuple[Tensor, Any]:
    if not torch.is_grad_enabled():
        y, carried = compiled(step)(*how, carried, x)
        return y, carried
    given, spec = tree_flatten((carried, x))
    leaves: list[Any] = []
    outputs = _Compiled.apply((step, how, spec, leaves), *given)  # type: ignore[no-untyped-call]
    made, spec = leaves
    y, carried = tree_unflatten(_merge(outputs, made), spec)
    return y, carried


def _merge(tensors: Sequence[Tensor], leaves: list[Any]) -> list[Any]:
    """`leaves` with its tensors replaced by `tensors`, in order."""
    own = iter(tensors)
    return [next(own) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


class _Compiled(torch.autograd.Function):
    """One step as a graph that stores nothing, and a graph that runs it again with its backward pass."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *given: Any) -> tuple[Tensor, ...]:
        step, how, spec, leaves = call
        plain = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in given]
        carried, x = tree_unflatten(plain, spec)  # as without gradients: the graph of evaluation serves both
        made, made_spec = tree_flatten(compiled(step)(*how, carried, x))
        leaves += [made, made_spec]
        ctx.step, ctx.how, ctx.spec = step, how, spec
        ctx.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in given]
        ctx.save_for_backward(*(leaf for leaf in given if isinstance(leaf, Tensor)))
        return tuple(leaf for leaf in made if isinstance(leaf, Tensor))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        own = iter(tensors)
        given = [next(own) if constant is None else constant[0] for constant in ctx.constants]
        with torch.autocast(tensors[0].device.type, enabled=False):
            found = compiled(pull_back)(ctx.step, ctx.how, tree_unflatten(given, ctx.spec), gradients)
        found = iter(found)
        return (None, *(next(found) if constant is None else None for constant in ctx.constants))


def pull_back(
    step: Step, how: tuple[Any, ...], given: tuple[Any, Any], gradients: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients at the tensors of `given` (carried state and piece) from those at the tensors of the result."""
    leaves, spec = tree_flatten(given)

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        made = step(*how, *tree_unflatten(_merge(tensors, leaves), spec))
        return tuple(leaf for leaf in tree_flatten(made)[0] if isinstance(leaf, Tensor))

    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    back = torch.func.vjp(outputs, *tensors)[1]
    found: tuple[Tensor, ...] = back(gradients)
    return found
