"""The Continuum Memory System token by token, with the parameters of a `CMS` module (float64).

Every level keeps W₁, W₂ and their momenta; errors come from automatic differentiation. Shapes: `x [B, T, D]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.layers.cms import CMS, FastLevel
from nested_learning.layers.mlp import SwiGLU
from nested_learning.layers.norm import RMSNorm
from nested_learning.ops.delta_rule.naive import step
from nested_learning.ops.memory_mlp.naive import errors, predict


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


class NaiveLevel:
    """One fast level of all rows, fed one token at a time."""

    def __init__(self, level: FastLevel, batch: int) -> None:
        self.level, self.batch, self.seen = level, batch, 0
        self.start()
        self.chunk_start, self.previous = list(self.weights), torch.zeros_like(self.weights[1][:, 0])

    def start(self) -> None:
        initial = (self.level.initial.initial_w1[0], self.level.initial.initial_w2[0])
        self.initial = [w.expand(self.batch, *w.shape) for w in initial]
        self.weights = list(self.initial)
        self.moments = [torch.zeros_like(w) for w in self.weights]

    def rates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        level, config = self.level, self.level.config
        logits = iter(() if level.rates is None else level.rates(x).unbind(-1))
        one = torch.ones_like(x[:, 0])
        if level.spec.eta is None:
            eta = config.step_limit(level.chunk_size) * next(logits).sigmoid()
        else:
            eta = one * level.spec.eta
        alpha = next(logits).sigmoid() if config.retention else one
        return eta, alpha, next(logits).sigmoid() if config.momentum else None

    def __call__(self, x: Tensor) -> Tensor:
        """Answer to `x [B, D]`, then the write of this token."""
        level, config, spec = self.level, self.level.config, self.level.spec
        own = unit(x) if level.keys is None else unit(level.keys(x))
        key, self.previous = (own if spec.target == "same" else self.previous), own
        answer = predict(self.chunk_start, unit(x))
        target, skip = level.values(x), torch.zeros_like(x)
        inner, at_output, at_z = errors(self.chunk_start, key, target, skip, config.error_limit)
        towards = config.retention and config.retention_target == "init"
        rest = self.initial if towards else [None, None]
        pairs = ((inner, at_output), (key, at_z))
        for i, (read_at, error) in enumerate(pairs):
            self.weights[i], self.moments[i] = step(
                self.weights[i], self.moments[i], read_at, error, self.rates(x), config.delta, rest[i]
            )
        self.seen += 1
        if level.reset_every is not None and self.seen % level.reset_every == 0:
            self.start()
        if self.seen % level.chunk_size == 0:
            self.chunk_start = list(self.weights)
        return answer if level.norm is None else rms_norm(answer, level.norm)


def naive_cms(cms: CMS, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs `[B, T, D]`, and W₁, W₂ (and momenta) of every fast level after the last whole chunk."""
    batch, tokens, dim = x.shape
    levels = [NaiveLevel(m, batch) if isinstance(m, FastLevel) else m for m in cms.levels]
    finals: dict[int, list[Tensor]] = {}
    outputs = []
    for t in range(tokens):
        current = total = x[:, t]
        for i, (norm, level) in enumerate(zip(cms.norms, levels, strict=True)):
            h = rms_norm(current, norm)
            y = plain(level, h) if isinstance(level, SwiGLU) else level(h)
            if cms.variant == "independent":
                shares = cms.shares.exp() / cms.shares.exp().sum(0)
                total = total + y * shares[i].repeat_interleave(dim // shares.shape[1])
            else:
                current = total = current + y
            if isinstance(level, NaiveLevel) and level.seen % level.level.chunk_size == 0:
                moments = level.moments if level.level.config.momentum else []
                finals[i] = [*level.weights, *moments]
        outputs.append(total)
    return torch.stack(outputs, 1), [tensor for i in sorted(finals) for tensor in finals[i]]


def rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def plain(mlp: SwiGLU, x: Tensor) -> Tensor:
    gate, up = (x @ mlp.w_in.weight.T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ mlp.w_out.weight.T
