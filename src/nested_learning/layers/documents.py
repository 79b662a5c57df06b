"""Several documents in one row, each processed as if it were alone in a row.

A document is a run of equal numbers, for every layer: a number that comes back later begins another document.
Attention sees the tokens of its own document only. Everything that carries a state is read in blocks, and
where a document begins the state of that row is put back to the start of a context. So documents may begin
only at multiples of a block, which is a whole number of chunks of every memory: `HopeConfig.alignment`.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nested_learning.layers.checks import describe
from nested_learning.state import State

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Documents(NamedTuple):
    """Which document of its row every token belongs to, counted from the left: `runs [B, T]`, and whether one
    begins with a block, `begins [B, ⌈T / block⌉]`. `block`: in tokens."""

    runs: Tensor
    begins: Tensor
    block: int


class Reader(Protocol):
    """A layer with explicit state."""

    def init_state(self, batch: int) -> Any:
        """State at the start of a context."""
        ...

    def __call__(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """`x [B, T, D]` → (`y [B, T, D]`, state)."""
        ...


def locate_documents(numbers: Tensor, block: int) -> Documents:
    """The documents of rows: runs of equal `numbers [B, T]`, integers. Marks of padding are such a run too.

    Raises:
        ValueError: other numbers, or a document that begins inside a block. (The latter is checked on the CPU
            only: elsewhere it would make the host wait for the device.)
    """
    if not isinstance(numbers, Tensor) or numbers.dtype not in INTEGERS or numbers.dim() != 2:
        raise ValueError(f"documents must be integers [batch, length], got {describe(numbers)}")
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    if numbers.device.type == "cpu":
        places = begins.nonzero()[:, 1]
        if bool((places % block != 0).any()):
            place = int(places[places % block != 0][0])
            raise ValueError(f"documents must begin at multiples of {block} tokens, got one at {place}")
    return Documents(begins.cumsum(1), begins[:, ::block], block)


def check_documents(documents: Documents | None, x: Tensor, state: object, owner: str) -> None:
    """Refuse documents that are not those of `x [B, T, D]`, or come with a state.

    Raises:
        ValueError: naming the layer, `owner`.
    """
    if documents is None:
        return
    if not isinstance(documents, Documents):
        raise ValueError(f"{owner} takes documents made by locate_documents, got {describe(documents)}")
    if documents.runs.shape != x.shape[:2]:
        raise ValueError(
            f"{owner} documents must be [batch, length] of x, {list(x.shape[:2])}, "
            f"got {list(documents.runs.shape)}"
        )
    if state is not None:
        raise ValueError(f"{owner} takes documents or a state, not both: documents start a context")


def read_apart(layer: Reader, x: Tensor, state: object, documents: Documents) -> tuple[Tensor, Any]:
    """`x [B, T, D]` → (`y [B, T, D]`, state): `layer`, with a new context where a document begins.

    `state` must be None: documents start a context.
    """
    check_documents(documents, x, state, type(layer).__name__)
    fresh: State = layer.init_state(x.shape[0])
    after, answers = fresh, []
    blocks = torch.split(x, documents.block, 1)
    for number, (part, begins) in enumerate(zip(blocks, documents.begins.unbind(1), strict=True)):
        if number:
            after = after.replace_rows(begins, fresh)
        y, after = layer(part, after)
        answers.append(y)
    return torch.cat(answers, 1), after
