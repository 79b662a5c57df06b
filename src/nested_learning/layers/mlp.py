"""The ordinary feed-forward layer."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


def swiglu_width(dim: int, expansion: float = 8 / 3) -> int:
    """Hidden width: `expansion * dim` rounded up to a multiple of 8.

    With 8/3, the three matrices of a SwiGLU weigh as much as the two of an MLP of expansion 4.
    """
    wanted = round(expansion * dim, 3)  # 2.6666667 * 768 means 2048, not a hair more
    return 8 * math.ceil(wanted / 8)


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) ⊙ W_up x), without biases (Shazeer 2020).

    Args:
        dim: model width D.
        hidden: hidden width, see `swiglu_width`.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w_in = nn.Linear(dim, 2 * hidden, bias=False)  # rows: W_gate, then W_up
        self.w_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        """`x [B, T, D]` to `(y [B, T, D], None)`: this layer remembers nothing."""
        gate, up = self.w_in(x).chunk(2, dim=-1)
        return self.w_out(F.silu(gate) * up), None
