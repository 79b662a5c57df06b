"""A loop over pieces of a sequence that carries state: compiled where it can be, recomputed where asked.

One compiled function serves all pieces of one shape, so the loop itself stays outside of any graph: a graph
of the whole loop would unroll it and take minutes to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Step = Callable[..., tuple[Tensor, Any]]


@cache
def compiled(step: Step) -> Step:
    """`step` through `torch.compile`: one graph for every set of shapes, shared by all layers of a process."""
    return torch.compile(step, dynamic=False, fullgraph=True)


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
def scan(
    step: Step, how: Sequence[Any], carried: Any, pieces: Sequence[tuple[Any, bool, bool]]
) -> tuple[list[Tensor], Any]:
    """Run `y, carried = step(*how, carried, piece)` over the pieces of a sequence.

    Args:
        step: a pure function of tensors, in tuples, and of constants.
        how: its constants.
        carried: state before the first piece.
        pieces: each with whether it goes through the compiler and whether the backward pass recomputes it
            (torch's activation checkpointing).

    Returns:
        every piece's y, and the state after the last.
    """
    answers = []
    for piece, compile_it, recompute in pieces:
        run = compiled(step) if compile_it else step
        if recompute and torch.is_grad_enabled():
            y, carried = checkpoint(run, *how, carried, piece, use_reentrant=False, preserve_rng_state=False)
        else:
            y, carried = run(*how, carried, piece)
        answers.append(y)
    return answers, carried
