"""The comparison model: our `linear` mixer with its memory run by flash-linear-attention.

The package's rule decays before it erases, S = α S (I − β k kᵀ) + β v kᵀ; ours erases what was there before
the decay, W = W (α I − η k kᵀ) + η v kᵀ. With β = η / α and α v in the place of v they are the same. Its
states are the transposes of ours.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from nested_learning.layers.documents import Documents
from nested_learning.layers.linear import GatedDeltaRule, LinearState
from nested_learning.layers.streams import activate, gate_output, split_heads, split_rates
from nested_learning.models.lm import HopeLM
from nested_learning.ops.unit import l2_normalize


def fla_installed() -> bool:
    """Whether the package flash-linear-attention can be imported."""
    return importlib.util.find_spec("fla") is not None


class FlaGatedDeltaRule(nn.Module):
    """A `GatedDeltaRule` whose reads and writes are `fla.ops.gated_delta_rule.chunk_gated_delta_rule`.

    Whole sequences only: documents and carried states are refused.
    """

    def __init__(self, ours: GatedDeltaRule) -> None:
        super().__init__()
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        if ours.config.momentum or not ours.config.delta:
            raise ValueError("the gated delta rule of flash-linear-attention has the delta term, no momentum")
        self.ours, self.rule = ours, chunk_gated_delta_rule

    def init_state(self, batch: int) -> LinearState:
        """As `GatedDeltaRule`."""
        return self.ours.init_state(batch)

    def forward(
        self, x: Tensor, state: LinearState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, LinearState]:
        """`x [B, T, D]` → (`y [B, T, D]`, state)."""
        if state is not None or documents is not None:
            raise ValueError("this comparison model reads whole sequences only")
        ours, (batch, tokens, _) = self.ours, x.shape
        projected = ours.project(x)
        dtype = projected.dtype  # that of autocast, where there is one
        projected, conv = ours.conv(projected, ours.conv.init_state(batch))
        k, v, q = activate(split_heads(projected, ours.heads), ours.around)
        logits = split_rates(ours.rates(x), ours.heads).to(k.dtype)
        with torch.autocast(x.device.type, enabled=False):
            eta, log_alpha, _ = ours.config.rates(logits.unbind(0), ours.config.step_limit(1.0))
            if log_alpha is not None:
                v = v * log_alpha.exp().unsqueeze(-1).to(v.dtype)
                eta = eta * (-log_alpha).exp()
            else:
                log_alpha = torch.zeros_like(eta)
            streams = (l2_normalize(q), l2_normalize(k), v)
            q, k, v = (self._last(stream.to(dtype), batch) for stream in streams)
            g, beta = (self._last(rate.float(), batch) for rate in (log_alpha, eta))
            y, last = self.rule(q, k, v, g, beta.to(dtype), scale=1.0, output_final_state=True)
        y = ours.norm(y.to(x.dtype)).reshape(batch, tokens, -1)
        y = ours.out(gate_output(ours.gate, y, x))
        return y, LinearState(last.transpose(-1, -2).float(), None, conv)

    @staticmethod
    def _last(stream: Tensor, batch: int) -> Tensor:
        """`[B · H, T, …]` to `[B, T, H, …]`."""
        return stream.view(batch, -1, *stream.shape[1:]).transpose(1, 2).contiguous()


def with_fla(model: HopeLM) -> None:
    """Replace the mixers of a `linear` model in place."""
    for block in model.blocks:
        assert isinstance(block.mixer, GatedDeltaRule)
        block.mixer = FlaGatedDeltaRule(block.mixer)
