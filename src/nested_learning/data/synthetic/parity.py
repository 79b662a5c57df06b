"""Running parity: the smallest task that needs a state that every token updates."""

from __future__ import annotations

import torch
from torch import Tensor


def parity_batch(
    batch_size: int, length: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random bits `[B, T]` and, at every position, the parity of the bits up to and including it `[B, T]`.

    Both are int64 with values 0 and 1, on the generator's device; T = `length`.

    Raises:
        ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    device = generator.device if generator is not None else torch.device("cpu")
    bits = torch.randint(0, 2, (batch_size, length), generator=generator, device=device)
    return bits, bits.cumsum(dim=1) % 2
