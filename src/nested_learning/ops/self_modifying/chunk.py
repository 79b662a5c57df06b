"""One chunk of self-modifying Titans: project, answer, make targets, write; and back.

    k = l2(x_k + M_k(x_k)),  v = x_v + M_v(x_v),  q = l2(x_q [+ M_q(x_q)])
    η = limit · sigmoid(r_η + M_η(x_k)),  α = sigmoid(r_α + M_α(x_k))
    y = q + M(q),  v̂_□ = P v + M_□(v),  every memory is written with keys k and targets v̂_□

where M_□(x) = W₁σ̂(W₂x), P = 1 but for the rates, and all reads are those of the chunk's start (Eq. 90).

Notation and shapes: see `stack.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.ops.memory_mlp.coefficients import coefficients, coefficients_backward
from nested_learning.ops.memory_mlp.stack import (
    Outputs,
    Stack,
    l2,
    l2_backward,
    none_of,
    part,
    read,
    read_backward,
)
from nested_learning.ops.memory_mlp.write import Kept, write, write_backward


class Plan(NamedTuple):
    """What is adaptive, and how.

    `full` names the memories of full width: "memory", then any of "k", "v", "q"; `rates` those of width 1:
    any of "eta", "alpha". `limit` bounds η; `targets`: self-made targets for all memories, else for the
    rates alone; `stop_targets`: no gradient through them.
    """

    full: tuple[str, ...]
    rates: tuple[str, ...]
    limit: float
    retention: bool = True
    targets: bool = True
    stop_targets: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        """The memories that project the input."""
        return self.full[1:] + self.rates

    @property
    def first_target(self) -> int:
        """Number of the first memory that makes its own target."""
        return 0 if self.targets else len(self.full)


class Inputs(NamedTuple):
    """Slow projections of a chunk: `k, v, q [N, C, d]`, k and q of unit norm, and slow logits of η and α."""

    k: Tensor
    v: Tensor
    q: Tensor
    rates: Tensor  # [2, N, C]


class Projected(NamedTuple):
    """What the memories make of the inputs, and the norms' factors `[N, C, 1]` (or what they would be)."""

    k: Tensor
    v: Tensor
    q: Tensor
    k_scale: Tensor
    q_scale: Tensor
    eta: Tensor  # [N, C]
    log_alpha: Tensor  # [N, C]


class ChunkKept(NamedTuple):
    """What the backward pass of a chunk keeps besides its inputs and the memories at its start.

    Keys, values and queries that no memory projects are the inputs themselves, and None here.
    """

    k: Tensor | None
    v: Tensor | None
    q: Tensor | None
    rest: tuple[Tensor, ...]  # k_scale, q_scale, η, log α
    write: Kept

    @staticmethod
    def of(p: Projected, write: Kept, plan: Plan) -> ChunkKept:
        """Of a chunk that was projected and written."""
        k, v, q = (t if name in plan.full else None for name, t in zip("kvq", p[:3], strict=True))
        return ChunkKept(k, v, q, tuple(p[3:]), write)

    def projected(self, x: Inputs) -> Projected:
        """What was made of the inputs `x`."""
        k, v, q = (own if kept is None else kept for own, kept in zip(x[:3], self[:3], strict=True))
        return Projected(k, v, q, *self.rest)


def _sources(x: Inputs, plan: Plan) -> Tensor:
    """The input of every projection `[M − 1, N, C, d]`."""
    named = {"k": x.k, "v": x.v, "q": x.q, "eta": x.k, "alpha": x.k}
    return torch.stack([named[name] for name in plan.projections])


def _project(w: Stack, x: Inputs, plan: Plan) -> Projected:
    added: dict[str, Tensor] = {}
    if plan.projections:
        outputs = read(_sources(x, plan), part(w, 1))
        added = dict(zip(plan.full[1:], outputs.full, strict=True))
        added |= dict(zip(plan.rates, outputs.rate, strict=True))
    one = torch.ones_like(x.k[..., :1])
    k, k_scale = l2(x.k + added["k"]) if "k" in added else (x.k, one)
    q, q_scale = l2(x.q + added["q"]) if "q" in added else (x.q, one)
    v = x.v + added["v"] if "v" in added else x.v
    eta, alpha = (
        logit + added[name].squeeze(-1) if name in added else logit
        for name, logit in zip(("eta", "alpha"), x.rates, strict=True)
    )
    log_alpha = F.logsigmoid(alpha) if plan.retention else torch.zeros_like(alpha)
    return Projected(k, v, q, k_scale, q_scale, plan.limit * torch.sigmoid(eta), log_alpha)


def _project_backward(
    w: Stack, x: Inputs, p: Projected, d: Inputs, plan: Plan
) -> tuple[Inputs, Stack | None]:
    """From gradients `d` at k, v, q and the logits of η and α to those at the inputs and the projections."""
    at = {
        "k": l2_backward(p.k, p.k_scale, d.k) if "k" in plan.full else d.k,
        "v": d.v,
        "q": l2_backward(p.q, p.q_scale, d.q) if "q" in plan.full else d.q,
        "eta": d.rates[0].unsqueeze(-1),
        "alpha": d.rates[1].unsqueeze(-1),
    }
    if not plan.projections:
        return d, None
    d_added = Outputs(
        torch.stack([at[name] for name in plan.full[1:]]) if plan.full[1:] else none_of(x.k, x.k.shape[-1]),
        torch.stack([at[name] for name in plan.rates]) if plan.rates else none_of(x.k, 1),
    )
    d_x, d_w = read_backward(_sources(x, plan), part(w, 1), d_added)
    d_k, d_v, d_q = at["k"], at["v"], at["q"]
    for name, more in zip(plan.projections, d_x, strict=True):
        if name == "v":
            d_v = d_v + more
        elif name == "q":
            d_q = d_q + more
        else:
            d_k = d_k + more
    return Inputs(d_k, d_v, d_q, d.rates), d_w


def _residuals(w: Stack, p: Projected, plan: Plan) -> Outputs:
    """P k − v̂ of every memory."""
    skip = (p.k - p.v).expand(len(plan.full), *p.k.shape)
    if not plan.targets and not plan.rates:
        return Outputs(skip, none_of(p.k, 1))
    own = read(p.v, part(w, plan.first_target))
    return Outputs(skip - own.full if plan.targets else skip, -own.rate)


def chunk_forward(w: Stack, x: Inputs, plan: Plan) -> tuple[Tensor, Stack, ChunkKept]:
    """Answers `[N, C, d]`, the memories after the chunk, and what `chunk_backward` needs."""
    p = _project(w, x, plan)
    answer = p.q + read(p.q, part(w, 0, 1)).full[0]
    c = coefficients(p.eta, p.log_alpha)
    after, kept = write(p.k, c, _residuals(w, p, plan), w)
    return answer, after, ChunkKept.of(p, kept, plan)


def chunk_backward(
    w: Stack, x: Inputs, kept: ChunkKept, d_answer: Tensor, d_after: Stack, plan: Plan
) -> tuple[Inputs, Stack]:
    """Gradients at the inputs and at the memories of the chunk's start."""
    p = kept.projected(x)
    c = coefficients(p.eta, p.log_alpha)
    d_k, d_c, d_residuals, d_w = write_backward(p.k, c, w, kept.write, d_after)
    grads = [(0, d_w)]
    d_skip = d_residuals.full.sum(0)
    d_k, d_v = d_k + d_skip, -d_skip
    if (plan.targets or plan.rates) and not plan.stop_targets:
        first = plan.first_target
        d_own = Outputs(-d_residuals.full if plan.targets else d_residuals.full[:0], -d_residuals.rate)
        d_x, d_targets = read_backward(p.v, part(w, first), d_own)
        d_v = d_v + d_x.sum(0)
        grads.append((first, d_targets))
    d_q, d_memory = read_backward(p.q, part(w, 0, 1), Outputs(d_answer[None], none_of(d_answer, 1)))
    grads.append((0, d_memory))
    d_eta, d_log_alpha = coefficients_backward(p.eta, p.log_alpha, c, d_c)
    d_rates = torch.stack(
        [
            d_eta * p.eta * (1 - p.eta / plan.limit),
            d_log_alpha * -torch.expm1(p.log_alpha) if plan.retention else torch.zeros_like(d_eta),
        ]
    )
    d_inputs, d_projections = _project_backward(w, x, p, Inputs(d_k, d_v, d_answer + d_q[0], d_rates), plan)
    if d_projections is not None:
        grads.append((1, d_projections))
    return d_inputs, _sum(w, grads)


def chunk_again_backward(
    w: Stack, x: Inputs, d_answer: Tensor, d_after: Stack, plan: Plan
) -> tuple[Inputs, Stack]:
    """`chunk_backward` with nothing kept. As one graph: what both passes compute is computed once."""
    kept = chunk_forward(w, x, plan)[2]
    return chunk_backward(w, x, kept, d_answer, d_after, plan)


def _sum(w: Stack, grads: list[tuple[int, Stack]]) -> Stack:
    """Gradients at the whole stack from those at parts of it, each with the number of its first memory."""
    total = grads[0][1]
    for first, more in grads[1:]:
        rest = w.w2.shape[0] - first - more.w2.shape[0], len(w.w1) - first - len(more.w1)
        total = Stack(
            total.w2 + F.pad(more.w2, (0, 0, 0, 0, 0, 0, first, rest[0])),
            total.w1 + F.pad(more.w1, (0, 0, 0, 0, 0, 0, min(first, len(w.w1)), max(0, rest[1]))),
            total.gate + more.gate if len(more.gate) else total.gate,
        )
    return total
