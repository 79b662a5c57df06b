"""The ordinary feed-forward layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.layers.checks import check_held, check_kind, widened
from nested_learning.state import State


def swiglu_width(dim: int, expansion: float = 8 / 3) -> int:
    """Hidden width: `expansion * dim` rounded up to a multiple of 8.

    With 8/3, the three matrices of a SwiGLU weigh as much as the two of an MLP of expansion 4.
    """
    wanted = round(expansion * dim, 3)  # avoid rounding 2048.0000256 up to 2056
    return 8 * math.ceil(wanted / 8)


@dataclass(frozen=True)
class SwiGLUState(State):
    """A SwiGLU's weights, one set per sequence: `w_in [B, 2·hidden, D]`, `w_out [B, D, hidden]`."""

    w_in: Tensor
    w_out: Tensor


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

    def init_state(self, batch: int, plain: bool = True) -> SwiGLUState | None:
        """The parameters as fast weights of `batch` sequences, in float32 at least; None without `plain`.

        The sequences share memory until something writes to it.
        """
        if not plain:
            return None
        return SwiGLUState(*(_repeat(linear.weight, batch) for linear in (self.w_in, self.w_out)))

    def forward(
        self, x: Tensor, state: SwiGLUState | None = None, documents: object = None
    ) -> tuple[Tensor, SwiGLUState | None]:
        """`x [B, T, D]` to `(y [B, T, D], state)`, by the parameters or, if `state` is given, by its weights.

        Tokens do not see one another, so `documents` make no difference.

        The layer writes nothing: the state that comes back is the one that was given (see `adapt`).
        """
        if state is None:
            gate, up = self.w_in(x).chunk(2, dim=-1)
            return self.w_out(F.silu(gate) * up), None
        check_kind(state, SwiGLUState, "SwiGLU")
        for held, linear in ((state.w_in, self.w_in), (state.w_out, self.w_out)):
            check_held(held, (linear.out_features, linear.in_features), x, "SwiGLU")
        gate, up = (x.to(state.w_in.dtype) @ state.w_in.mT).chunk(2, dim=-1)
        return ((F.silu(gate) * up).to(state.w_out.dtype) @ state.w_out.mT).to(x.dtype), state


def _repeat(weight: Tensor, batch: int) -> Tensor:
    return weight.to(widened(weight)).expand(batch, *weight.shape)
