"""Linear memories that rewrite themselves, each by itself and token by token: the oracle of the layer.

It knows no gain: every memory has weights of its own, and is written by its own errors.
"""

from __future__ import annotations

import torch
from naive_streams import controlled, output, slow_streams, unit
from torch import Tensor

from nested_learning.layers.self_modifying_linear import SelfModifyingLinear
from nested_learning.ops.delta_rule.naive import step
from nested_learning.ops.self_modifying_linear.naive import cap_steps

RATES = ("eta", "alpha")


class NaiveMatrix:
    """One memory M of all sequences and heads, `[B, H, o, d]`: at the start of its chunk, before and after
    the last token; and its momentum."""

    def __init__(self, layer: SelfModifyingLinear, name: str, batch: int) -> None:
        initial = layer.memories[f"initial_{name}"]
        self.config = layer.config
        self.initial = self.start = self.before = self.now = initial.expand(batch, *initial.shape)
        self.moments = self.start_moments = torch.zeros_like(self.initial)

    def write(self, key: Tensor, value: Tensor, rates: tuple[Tensor, Tensor, Tensor | None]) -> None:
        """Write one token towards M(value): `key, value [B, H, d]`, rates (η, α, β) `[B, H]`."""
        config = self.config
        error = apply(self.start, key) - apply(self.start, value)
        rest = self.initial if config.retention and config.retention_target == "init" else None
        self.before = self.now
        self.now, self.moments = step(self.now, self.moments, key, error, rates, config.delta, rest)

    def end_chunk(self) -> None:
        """Let the next chunk read what was written."""
        self.start, self.start_moments = self.now, self.moments


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    """Mx, `[B, H, o]`."""
    return torch.einsum("bhod,bhd->bho", matrix, x)


def naive_self_modifying_linear(
    layer: SelfModifyingLinear, x: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, ...]]]:
    """The layer over `x [B, T, D]` from the start of a context; differentiable.

    Returns:
        its output `[B, T, D]`; and every memory (and with momentum its momentum) `[B, H, o, d]` at the last
        boundary of a chunk.
    """
    config = layer.config
    (ks, vs, qs), logits = slow_streams(layer, x)
    ks, vs, qs = unit(ks), unit(vs), unit(qs)
    names = [name.removeprefix("initial_") for name in layer.memories]
    memories = {name: NaiveMatrix(layer, name, x.shape[0]) for name in names}
    limit = config.eta_max or min(1.0, 2 / layer.chunk_size)
    answers = []

    def recall(name: str, at: Tensor) -> Tensor:
        return apply(memories[name].start, at) if name in memories else at

    for t in range(x.shape[1]):
        k = unit(recall("k", ks[:, t])) if "k" in memories else ks[:, t]
        q = unit(recall("q", qs[:, t])) if "q" in memories else qs[:, t]
        v = unit(recall("v", vs[:, t])) if "v" in memories else vs[:, t]
        rate = list(logits[:, t].unbind(1))
        for i, name in enumerate(RATES):
            if name in memories:
                rate[i] = rate[i] + recall(name, ks[:, t])[..., 0]
        eta = limit * torch.sigmoid(rate[0])
        alpha = torch.sigmoid(rate[1]) if config.retention else torch.ones_like(eta)
        beta = torch.sigmoid(rate[2]) if config.momentum else None
        eta = controlled(config, eta, alpha)
        if config.injection_cap:
            eta = cap_steps(eta, torch.sigmoid(-rate[1]), k - v)
        for memory in memories.values():
            memory.write(k, v, (eta, alpha, beta))
        main = memories["memory"]
        used = {"chunk": main.start, "before_write": main.before, "after_write": main.now}[layer.read]
        answers.append(apply(used, q))
        if (t + 1) % layer.chunk_size == 0:
            for memory in memories.values():
                memory.end_chunk()
    finals = {
        name: (memory.start, *((memory.start_moments,) if config.momentum else ()))
        for name, memory in memories.items()
    }
    return output(layer, torch.stack(answers, 1), x), finals
