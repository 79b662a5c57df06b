"""The Continuum Memory System token by token, with the parameters of a `CMS` module (float64).

Every level keeps W₁, W₂ and their momenta; errors come from automatic differentiation. Shapes: `x [B, T, D]`.
"""

from __future__ import annotations

import torch
from naive_streams import controlled, rms_norm, unit
from torch import Tensor

from nested_learning.layers.cms import CMS, FastLevel
from nested_learning.layers.mlp import SwiGLU
from nested_learning.ops.delta_rule.naive import step
from nested_learning.ops.memory_mlp.naive import errors, predict


class NaiveLevel:
    """One fast level of all rows, fed one token at a time."""

    def __init__(self, level: FastLevel, batch: int) -> None:
        self.level, self.batch, self.seen = level, batch, 0
        self.start()
        self.end_chunk()
        self.previous = torch.zeros_like(self.weights[1][:, 0])

    def start(self) -> None:
        initial = (self.level.initial.initial_w1[0], self.level.initial.initial_w2[0])
        self.initial = [w.expand(self.batch, *w.shape) for w in initial]
        self.weights = list(self.initial)
        self.moments = [torch.zeros_like(w) for w in self.weights]

    def end_chunk(self) -> None:
        self.chunk_start, self.start_moments = list(self.weights), list(self.moments)

    def rates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        level, config = self.level, self.level.config
        logits = iter(() if level.rates is None else level.rates(x).unbind(-1))
        one = torch.ones_like(x[:, 0])
        if level.spec.eta is None:
            eta = (config.eta_max or min(1.0, 2 / level.chunk_size)) * next(logits).sigmoid()
        else:
            eta = one * level.spec.eta
        alpha = next(logits).sigmoid() if config.retention else one
        return controlled(config, eta, alpha), alpha, next(logits).sigmoid() if config.momentum else None

    def __call__(self, x: Tensor) -> Tensor:
        """Answer to `x [B, D]`, then the write of this token."""
        level, config, spec = self.level, self.level.config, self.level.spec
        own = unit(x) if level.keys is None else unit(level.keys(x))
        rates = self.rates(x)
        key, self.previous = (own if spec.target == "same" else self.previous), own
        answer = predict(self.chunk_start, unit(x))
        target, skip = level.values(x), torch.zeros_like(x)
        inner, at_output, at_z = errors(self.chunk_start, key, target, skip, config.error_limit)
        towards = config.retention and config.retention_target == "init"
        rest = self.initial if towards else [None, None]
        pairs = ((inner, at_output), (key, at_z))
        for i, (read_at, error) in enumerate(pairs):
            self.weights[i], self.moments[i] = step(
                self.weights[i], self.moments[i], read_at, error, rates, config.delta, rest[i]
            )
        self.seen += 1
        if level.reset_every is not None and self.seen % level.reset_every == 0:
            self.start()
        if self.seen % level.chunk_size == 0:
            self.end_chunk()
        return answer if level.norm is None else rms_norm(answer, level.norm)


def naive_cms(cms: CMS, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs `[B, T, D]`, and W₁, W₂ (and momenta) of every fast level at the last boundary
    of its chunks."""
    batch, tokens, dim = x.shape
    levels = [NaiveLevel(m, batch) if isinstance(m, FastLevel) else m for m in cms.levels]
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
        outputs.append(total)
    finals: list[Tensor] = []
    for level in levels:
        if isinstance(level, NaiveLevel):
            finals += level.chunk_start + (level.start_moments if level.level.config.momentum else [])
    return torch.stack(outputs, 1), finals


def plain(mlp: SwiGLU, x: Tensor) -> Tensor:
    gate, up = (x @ mlp.w_in.weight.T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ mlp.w_out.weight.T
