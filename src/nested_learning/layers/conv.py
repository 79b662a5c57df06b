"""Short causal convolution along the sequence, one filter per channel.

Shapes: B batch, T tokens, D channels, W window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.layers.checks import check_held, check_input, check_kind
from nested_learning.layers.documents import Documents, check_documents
from nested_learning.state import State


@dataclass(frozen=True)
class ConvState(State):
    """The last W − 1 inputs, oldest first: `inputs [B, W - 1, D]`; zeros at the start of a context."""

    inputs: Tensor


class CausalConv(nn.Module):
    """y_t = Σ_i weight[:, i] ⊙ x_{t − W + 1 + i}: depthwise, causal, without bias.

    Taps start uniform in ±1/√W, not as the identity: keys that mix neighbouring tokens from the first step
    are what lets a memory bind a value to the token before it (recall is learned much sooner).

    Args:
        dim: channels D.
        window: taps W, the current token included.
    """

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"CausalConv window must be at least 1, got {window}")
        self.weight = nn.Parameter(torch.empty(dim, window).uniform_(-(window**-0.5), window**-0.5))

    def init_state(self, batch: int) -> ConvState:
        """State at the start of a context."""
        dim, window = self.weight.shape
        return ConvState(self.weight.new_zeros(batch, window - 1, dim))

    def forward(
        self, x: Tensor, state: ConvState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, ConvState]:
        """`x [B, T, D]` to `(y [B, T, D], state)`; any split of a sequence gives the same outputs.

        With `documents`, those of x and only without a state, a token sees only tokens of its own.
        """
        dim, window = self.weight.shape
        check_input(x, dim, "CausalConv")
        check_documents(documents, x, state, "CausalConv")
        tokens, past = x.shape[1], window - 1
        if state is None:
            before = x.new_zeros(x.shape[0], past, dim)
        else:
            check_kind(state, ConvState, "CausalConv")
            check_held(state.inputs, (past, dim), x, "CausalConv")
            before = state.inputs.to(x.dtype)
        padded = torch.cat([before, x], dim=1)
        last = padded[:, tokens:].clone()  # a copy, or W - 1 rows would keep all of `padded`
        weight = self.weight.to(padded.dtype)
        if documents is not None:
            return _apart(padded, weight, documents.runs), ConvState(last)
        y: Tensor = _ShiftedSum.apply(padded, weight)  # type: ignore[no-untyped-call]
        return y, ConvState(last)

    def extra_repr(self) -> str:
        """Channels and window, for `print(model)`."""
        return f"{self.weight.shape[0]}, window={self.weight.shape[1]}"


def _apart(padded: Tensor, weight: Tensor, runs: Tensor) -> Tensor:
    """The convolution where a token sees only those with its number in `runs [B, T]`."""
    tokens, past = runs.shape[1], weight.shape[1] - 1
    numbers = F.pad(runs, (past, 0), value=-1)  # of `padded`: no document begins before the row
    y = padded[:, past:] * weight[:, past]
    for i in range(past):
        same = (numbers[:, i : i + tokens] == runs)[..., None]
        y = y + torch.where(same, padded[:, i : i + tokens], 0) * weight[:, i]
    return y


class _ShiftedSum(torch.autograd.Function):
    """The convolution, without a copy of the padded input for every tap in the graph.

    W multiply-adds. F.conv1d(groups=D) took twice as long even under automatic differentiation
    (x [4, 1024, 768], W = 4, forward and backward, 2 threads).
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        tokens = padded.shape[1] - weight.shape[1] + 1
        y = padded[:, :tokens] * weight[:, 0]
        for i in range(1, weight.shape[1]):
            y = torch.addcmul(y, padded[:, i : i + tokens], weight[:, i])
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
        padded, weight = ctx.saved_tensors
        tokens, taps = d_y.shape[1], weight.shape[1]
        d_padded = sum(F.pad(d_y * weight[:, i], (0, 0, i, taps - 1 - i)) for i in range(taps))
        d_weight = [(d_y * padded[:, i : i + tokens]).sum((0, 1)) for i in range(taps)]
        return torch.as_tensor(d_padded), torch.stack(d_weight, 1)
