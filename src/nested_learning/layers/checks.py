"""What a layer refuses at its door: input of another shape, and the state of another layer.

Only what the host knows is looked at, shapes, types and devices: no value of a tensor is read, so nothing
waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nested_learning.state import State


def describe(value: object) -> str:
    """What was given instead, for an error: "float32 [2, 3]", or the name of a type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def check_input(x: Tensor, width: int, owner: str) -> None:
    """Refuse what is not `[B, T, width]` in floating point, with B and T of at least 1.

    Raises:
        ValueError: naming the layer, `owner`.
    """
    fits = isinstance(x, Tensor) and x.dim() == 3 and x.shape[2] == width and 0 not in x.shape
    if not fits or not x.is_floating_point():
        raise ValueError(
            f"{owner} takes floating-point input [batch, length, {width}] with batch and length of at least "
            f"1, got {describe(x)}"
        )


def check_heads(dim: int, heads: int, owner: str) -> None:
    """Refuse a number of heads that does not divide the width. Raises ValueError."""
    if heads < 1 or dim % heads:
        raise ValueError(f"{owner} num_heads must divide dim = {dim}, got {heads}")


def check_kind(state: object, kind: type[State], owner: str) -> None:
    """Refuse a state that is not of class `kind`. Raises ValueError."""
    if not isinstance(state, kind):
        raise ValueError(f"{owner} takes a {kind.__name__} as state, got {describe(state)}")


def check_held(
    held: Tensor, sizes: Sequence[int], x: Tensor, owner: str, dtype: torch.dtype | None = None
) -> None:
    """Refuse a tensor of a state that does not belong to a layer and its input.

    Args:
        held: `[B, *sizes]`.
        sizes: all but the batch.
        x: the input, which gives batch and device.
        owner: name of the layer.
        dtype: of the tensor; None = any.

    Raises:
        ValueError: another batch, shape, type or device.
    """
    same = held.shape == (x.shape[0], *sizes) and held.device == x.device
    if not same or (dtype is not None and held.dtype != dtype):
        raise ValueError(f"{owner} state must {_mismatch(held, sizes, x, dtype)}")


def _mismatch(held: Tensor, sizes: Sequence[int], x: Tensor, dtype: torch.dtype | None) -> str:
    if held.shape[:1] != x.shape[:1]:
        return f"have the batch of x, {x.shape[0]}, got {len(held)}"
    if held.shape[1:] != tuple(sizes):
        return f"hold [batch, {', '.join(map(str, sizes))}] here, got {list(held.shape)}"
    if held.device != x.device:
        return f"be on the device of x, {x.device}, got {held.device} (state.to moves it)"
    return f"be {dtype}, got {held.dtype}"


def widened(parameter: Tensor) -> torch.dtype:
    """Type of the fast weights that start from a parameter: float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)
