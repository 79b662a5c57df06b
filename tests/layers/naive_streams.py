"""What the token loops of the layers share: the slow streams of a mixer, the norms, and its output."""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.layers.config import MemoryConfig
from nested_learning.layers.linear import GatedDeltaRule
from nested_learning.layers.norm import RMSNorm
from nested_learning.layers.self_modifying import SelfModifyingTitans
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear

Mixer = SelfModifyingTitans | SelfModifyingLinear | GatedDeltaRule


def controlled(config: MemoryConfig, eta: Tensor, alpha: Tensor) -> Tensor:
    """The step sizes that `step_control` allows."""
    if config.step_control == "clamp" and config.delta:
        return torch.where(eta > 2 * (1 - 1e-6) * alpha, 2 * (1 - 1e-6) * alpha, eta)
    return eta


def unit(x: Tensor) -> Tensor:
    """x / √(‖x‖² + 10⁻⁶)."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """x over its root mean square, times the gain of `norm`."""
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def slow_streams(layer: Mixer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Convolved k, v, q `[3, B, T, H, d]`, the convolution as a loop, and logits of rates `[B, T, G, H]`."""
    batch, tokens, _ = x.shape
    projected = x @ layer.project.weight.T
    window = layer.conv.weight.shape[1]
    columns = []
    for t in range(tokens):
        lags = range(min(window, t + 1))
        terms = [layer.conv.weight[:, window - 1 - lag] * projected[:, t - lag] for lag in lags]
        columns.append(torch.stack(terms).sum(0))
    mixed = torch.stack(columns, 1)
    if layer.around.activation == "silu":
        mixed = mixed * torch.sigmoid(mixed)
    streams = mixed.view(batch, tokens, 3, layer.heads, -1).permute(2, 0, 1, 3, 4)
    logits = x @ layer.rates.weight.T + layer.rates.bias
    return streams, logits.view(batch, tokens, -1, layer.heads)


def output(layer: Mixer, answers: Tensor, x: Tensor) -> Tensor:
    """The layer's output `[B, T, D]` from what its heads answer, `[B, T, H, d]`, and its input x."""
    y = rms_norm(answers, layer.norm).flatten(2)
    if layer.gate is not None:
        gate = x @ layer.gate.weight.T
        y = y * gate * torch.sigmoid(gate)
    return y @ layer.out.weight.T
