"""Several documents in one row, each read as if it stood in a row of its own.

Attention sees the tokens of its own document only. Everything that carries a state is read in blocks, and
where a document begins the state of that row is put back to the start of a context. So documents may begin
only at multiples of a block, which is a whole number of chunks of every memory: `HopeConfig.alignment`.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nested_learning.state import State


class Documents(NamedTuple):
    """Which document every token belongs to: `numbers [B, T]`, and whether one begins with a block,
    `begins [B, ⌈T / block⌉]`. `block`: in tokens."""

    numbers: Tensor
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
    """The documents of rows in which token t belongs to document `numbers[:, t]`, `[B, T]` integers.

    Raises:
        ValueError: a document begins inside a block. (Checked on the CPU only: elsewhere it would make the
            host wait for the device.)
    """
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    if numbers.device.type == "cpu":
        places = begins.nonzero()[:, 1]
        if bool((places % block != 0).any()):
            place = int(places[places % block != 0][0])
            raise ValueError(f"documents must begin at multiples of {block} tokens, got one at {place}")
    return Documents(numbers, begins[:, ::block], block)


def read_apart(layer: Reader, x: Tensor, documents: Documents) -> tuple[Tensor, Any]:
    """`x [B, T, D]` → (`y [B, T, D]`, state): `layer`, with a new context where a document begins."""
    fresh: State = layer.init_state(x.shape[0])
    state, answers = fresh, []
    blocks = torch.split(x, documents.block, 1)
    for number, (part, begins) in enumerate(zip(blocks, documents.begins.unbind(1), strict=True)):
        if number:
            state = state.replace_rows(begins, fresh)
        y, state = layer(part, state)
        answers.append(y)
    return torch.cat(answers, 1), state
