"""Self-modifying Titans token by token, from the equations: the oracle of the layer."""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.layers.self_modifying import SelfModifyingTitans
from nested_learning.ops.delta_rule.naive import step
from nested_learning.ops.memory_mlp.naive import errors, predict

Pair = tuple[Tensor, Tensor]


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def slow_streams(layer: SelfModifyingTitans, x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit k, v, q `[3, B, T, H, d]` and logits of the rates `[B, T, G, H]`; the convolution is a loop."""
    batch, tokens, dim = x.shape
    projected = x @ layer.project.weight.T
    window = layer.conv.weight.shape[1]
    mixed = torch.zeros_like(projected)
    for t in range(tokens):
        for lag in range(min(window, t + 1)):
            mixed[:, t] += layer.conv.weight[:, window - 1 - lag] * projected[:, t - lag]
    streams = unit(mixed.view(batch, tokens, 3, layer.heads, -1)).permute(2, 0, 1, 3, 4)
    logits = x @ layer.rates.weight.T + layer.rates.bias
    return streams, logits.view(batch, tokens, -1, layer.heads)


def naive_self_modifying(layer: SelfModifyingTitans, x: Tensor) -> Tensor:
    """The layer's output `[B, T, D]` for `x [B, T, D]` at the start of a context; differentiable."""
    config, batch = layer.config, x.shape[0]
    (ks, vs, qs), logits = slow_streams(layer, x)
    now: dict[str, Pair] = {}
    for name, _ in layer.chunks:
        memory = layer.memories[name]
        now[name] = tuple(w.expand(batch, *w.shape) for w in (memory.initial_w1, memory.initial_w2))
    initial = dict(now)
    moments = {name: tuple(torch.zeros_like(w) for w in pair) for name, pair in now.items()}
    start, answers = dict(now), []
    for t in range(x.shape[1]):
        for name, chunk in layer.chunks:
            if t % chunk == 0:
                start[name] = now[name]

        def recall(name: str, at: Tensor) -> Tensor | float:
            return predict(start[name], at) if name in start else 0.0

        k = unit(ks[:, t] + recall("k", ks[:, t])) if "k" in now else ks[:, t]
        q = unit(qs[:, t] + recall("q", qs[:, t])) if "q" in now else qs[:, t]
        v = vs[:, t] + recall("v", vs[:, t])
        rate = [logits[:, t, i] for i in range(logits.shape[2])]
        for i, name in enumerate(("eta", "alpha")):
            if name in now:
                rate[i] = rate[i] + predict(start[name], ks[:, t])[..., 0]
        limit = config.eta_max or min(1.0, 2 / layer.chunk)
        eta = limit * torch.sigmoid(rate[0])
        alpha = torch.sigmoid(rate[1]) if config.retention else torch.ones_like(eta)
        beta = torch.sigmoid(rate[2]) if config.momentum else None
        before = now["memory"]
        for name, _ in layer.chunks:
            gate = name in ("eta", "alpha")
            skip = torch.zeros_like(eta)[..., None] if gate else k
            own = config.self_targets or gate
            target = torch.zeros_like(skip) if gate else v
            if own:
                made = predict(start[name], v)
                target = target + made
            if config.stop_gradient_targets:
                target = target.detach()
            inner, at_output, at_z = errors(start[name], k, target, skip, config.error_limit)
            rest = initial[name] if config.retention_target == "init" and config.retention else (None, None)
            w1, s1 = step(
                now[name][0], moments[name][0], inner, at_output, (eta, alpha, beta), config.delta, rest[0]
            )
            w2, s2 = step(now[name][1], moments[name][1], k, at_z, (eta, alpha, beta), config.delta, rest[1])
            now[name], moments[name] = (w1, w2), (s1, s2)
        used = {"chunk": start["memory"], "before_write": before, "after_write": now["memory"]}[layer.read]
        answers.append(q + predict(used, q))
    y = torch.stack(answers, 1)  # [B, T, H, d]
    y = y / (y.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt() * layer.norm.weight
    return y.flatten(2) @ layer.out.weight.T
