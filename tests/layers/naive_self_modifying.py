"""Self-modifying Titans token by token, from the equations: the oracle of the layer."""

from __future__ import annotations

import torch
from naive_streams import controlled, output, slow_streams, unit
from torch import Tensor

from nested_learning.layers.self_modifying import SelfModifyingTitans
from nested_learning.ops.delta_rule.naive import step
from nested_learning.ops.memory_mlp.naive import errors, predict

Pair = tuple[Tensor, Tensor]
RATES = ("eta", "alpha")


class NaiveMemory:
    """One memory of all sequences and heads, `[B, H, …]`, written token by token.

    Weights and momenta are pairs, those of W₁ and of W₂. `start`, `start_moments` are those of the chunk's
    start; `now`, `moments` those after the last token; `before` those before it.
    """

    def __init__(self, layer: SelfModifyingTitans, name: str, chunk: int, batch: int) -> None:
        memory = layer.memories[name]
        self.config, self.chunk, self.is_rate = layer.config, chunk, name in RATES
        self.initial: Pair = tuple(w.expand(batch, *w.shape) for w in (memory.initial_w1, memory.initial_w2))
        self.now = self.before = self.start = self.initial
        self.moments = self.start_moments = tuple(torch.zeros_like(w) for w in self.initial)
        self.seen = 0

    def write(self, key: Tensor, value: Tensor, rates: tuple[Tensor, Tensor, Tensor | None]) -> None:
        """Write one token, `key, value [B, H, d]`, rates (η, α, β) `[B, H]`."""
        config = self.config
        skip = torch.zeros_like(key[..., :1]) if self.is_rate else key
        target = torch.zeros_like(skip) if self.is_rate else value
        if config.self_targets or self.is_rate:
            target = target + predict(self.start, value)
        if config.stop_gradient_targets:
            target = target.detach()
        inner, at_output, at_z = errors(self.start, key, target, skip, config.error_limit)
        towards = config.retention and config.retention_target == "init"
        rest = self.initial if towards else (None, None)
        layers = zip(self.now, self.moments, (inner, key), (at_output, at_z), rest, strict=True)
        written = [step(w, s, x, error, rates, config.delta, to) for w, s, x, error, to in layers]
        self.before = self.now
        self.now, self.moments = zip(*written, strict=True)
        self.seen += 1

    def end_token(self) -> None:
        """At the end of a chunk, let the next one read what was written."""
        if self.seen % self.chunk == 0:
            self.start, self.start_moments = self.now, self.moments


def naive_self_modifying(
    layer: SelfModifyingTitans, x: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, ...]]]:
    """The layer over `x [B, T, D]` from the start of a context; differentiable.

    Returns:
        its output `[B, T, D]`; and of every memory W₁, W₂ (and with momentum S₁, S₂) `[B, H, …]` at the last
        boundary of its chunks.
    """
    config = layer.config
    (ks, vs, qs), logits = slow_streams(layer, x)
    ks, vs, qs = unit(ks), unit(vs), unit(qs)
    memories = {name: NaiveMemory(layer, name, chunk, x.shape[0]) for name, chunk in layer.chunks}
    limit = config.eta_max or 1.0
    answers = []

    def recall(name: str, at: Tensor) -> Tensor | float:
        return predict(memories[name].start, at) if name in memories else 0.0

    for t in range(x.shape[1]):
        k = unit(ks[:, t] + recall("k", ks[:, t])) if "k" in memories else ks[:, t]
        q = unit(qs[:, t] + recall("q", qs[:, t])) if "q" in memories else qs[:, t]
        v = vs[:, t] + recall("v", vs[:, t])
        rate = list(logits[:, t].unbind(1))
        for i, name in enumerate(RATES):
            if name in memories:
                rate[i] = rate[i] + predict(memories[name].start, ks[:, t])[..., 0]
        eta = limit * torch.sigmoid(rate[0])
        alpha = torch.sigmoid(rate[1]) if config.retention else torch.ones_like(eta)
        beta = torch.sigmoid(rate[2]) if config.momentum else None
        eta = controlled(config, eta, alpha)
        for name, memory in memories.items():
            own = config.projection_eta_max or min(1.0, 2 / memory.chunk)
            slower = 1.0 if name == "memory" else min(1.0, own / limit)
            memory.write(k, v, (slower * eta, alpha, beta))
        main = memories["memory"]
        used = {"chunk": main.start, "before_write": main.before, "after_write": main.now}[layer.read]
        answers.append(q + predict(used, q))
        for memory in memories.values():
            memory.end_token()
    finals = {
        name: (*memory.start, *(memory.start_moments if config.momentum else ()))
        for name, memory in memories.items()
    }
    return output(layer, torch.stack(answers, 1), x), finals
