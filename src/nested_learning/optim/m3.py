"""M3, multi-scale momentum with Muon's orthogonalisation (Algorithm 1, Eq. 75)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nested_learning.ops.newton_schulz import newton_schulz_all
from nested_learning.optim.base import (
    DeepOptimizer,
    apply,
    gradient,
    shard_like,
    whole,
    wide,
    wide_type,
    wide_zeros,
)
from nested_learning.optim.config import M3Config

RMS = 0.2  # of AdamW's steps, about (Liu et al. 2025, "Muon is scalable for LLM training")
TINY = 1e-12


class M3(DeepOptimizer):
    """Two momenta of different speed, both orthogonalised (Algorithm 1, Eq. 75).

    Per matrix W with gradient g, in step t of block k = ⌊(t − 1)/f⌋:

        M₂ ← β₃ M₂ + (1 − β₃) Σ g over the f steps of the block before, O₂ = NS(M₂)   once per block
        M₁ ← β₁ M₁ + (1 − β₁) g,   V ← β₂ V + (1 − β₂) g²,   O₁ = NS(M₁)
        W ← (1 − lr λ) W − lr · scale · (O₁ + α O₂) / √(V + ε)

    The slow O₂ is computed once per block and kept, so that a step costs little more than Muon's. All
    matrices of a shape share their Newton–Schulz products. Parameters that are not 2-D, and groups with
    `adamw=True` (embeddings, heads), are updated by AdamW. Momenta are float32 beside bfloat16 parameters.
    Sharded parameters (FSDP2) work: each process orthogonalises the gathered momentum. `torch.compile` of
    `step` rounds the bfloat16 Newton–Schulz in other places: after three steps weights were apart by 3 % of
    the way they had gone, and by 1e-6 of it with `ns_dtype="float32"`.

    Args:
        params, lr, weight_decay: see `DeepOptimizer`.
        options: see `optim.config.M3Config`. `M3(params, accumulation="sum", adjust="none")` is the
            algorithm as printed.

    Example:
        >>> matrices = [p for n, p in model.named_parameters() if "embedding" not in n]
        >>> optimizer = M3([{"params": matrices}, {"params": model.embedding.parameters(), "adamw": True}])
    """

    rule = M3Config

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, lr, weight_decay, options)

    def _initial_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        """AdamW's, or `step`, M₁ `fast`, V `second`, M₂ `slow`, O₂ `slow_output`, as far as they are used."""
        if not _is_matrix(group, parameter):
            names = ("exp_avg", "exp_avg_sq")
            return {"step": torch.zeros(()), **{name: wide_zeros(parameter) for name in names}}
        wanted = {"fast": True, "second": group["second_moment"], "slow": group["slow_weight"] != 0}
        state = {name: wide_zeros(parameter) for name, is_used in wanted.items() if is_used}
        if wanted["slow"]:
            dtype = _ns_dtype(group) or wide_type(parameter)
            state["slow_output"] = torch.zeros_like(parameter, dtype=dtype)
        return {"step": 0, **state}

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        matrices = [p for p in params if _is_matrix(group, p)]
        others = [p for p in params if not _is_matrix(group, p)]
        if others:
            self._update_by_adamw(group, others)
        if matrices:
            self._update_matrices(group, matrices)

    def _update_matrices(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [gradient(p) for p in params]
        states = [self.state[p] for p in params]
        if group["slow_weight"]:
            self._update_slow(group, states, grads)
        fast = self._update_fast(group, states, grads)
        steps = _orthogonal(fast, params, group)
        _add_slow(steps, states, group)
        if group["second_moment"]:
            _divide(steps, [s["second"] for s in states], grads, group)
        for p, step, state in zip(params, steps, states, strict=True):
            apply(p, _scaled(step, group).mul_(-group["lr"]), group)
            state["step"] += 1

    def _update_slow(self, group: dict[str, Any], states: list[dict[str, Any]], grads: list[Tensor]) -> None:
        """M₂ gathers the gradients of the running block; it is not read before the block is over."""
        beta, every = group["betas"][2], group["slow_every"]
        ema = group["accumulation"] == "ema"
        due = [s for s in states if s["step"] and s["step"] % every == 0]
        if due:
            slow = [s["slow"] for s in due]
            for state, output in zip(due, _orthogonal(slow, slow, group), strict=True):
                state["slow_output"] = output
            if ema:
                torch._foreach_mul_(slow, beta)  # the next block's M₂ starts at β₃ M₂
        torch._foreach_add_([s["slow"] for s in states], grads, alpha=1 - beta if ema else beta)

    def _update_fast(
        self, group: dict[str, Any], states: list[dict[str, Any]], grads: list[Tensor]
    ) -> list[Tensor]:
        """M₁ after this gradient, or with `nesterov` the mean of it and the gradient."""
        beta, fast = group["betas"][0], [s["fast"] for s in states]
        if group["accumulation"] == "sum":
            torch._foreach_add_(fast, grads, alpha=beta)
            return fast
        torch._foreach_lerp_(fast, grads, 1 - beta)
        return list(torch._foreach_lerp(grads, fast, beta)) if group["nesterov"] else fast

    def _update_by_adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        moved = [wide(p) for p in params]  # the parameters themselves, unless they are narrow
        grads = [gradient(p) for p in params]
        states = [self.state[p] for p in params]
        means, squares, steps = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["adamw_betas"]
        adamw(
            moved,
            grads,
            means,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["adamw_eps"],
            maximize=False,
        )
        for p, new in zip(params, moved, strict=True):
            if new is not p:
                p.copy_(new)


def _is_matrix(group: dict[str, Any], parameter: Tensor) -> bool:
    """Whether the rule for matrices updates `parameter`, and not AdamW."""
    return parameter.ndim == 2 and not group["adamw"]


def _ns_dtype(group: dict[str, Any]) -> torch.dtype | None:
    """Type of the Newton–Schulz products; None = that of the momenta."""
    dtype: torch.dtype | None = None if group["ns_dtype"] == "param" else getattr(torch, group["ns_dtype"])
    return dtype


def _orthogonal(momenta: list[Tensor], like: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Newton–Schulz of every momentum, in `ns_dtype`, sharded as `like` is."""
    gathered = [whole(m) for m in momenta]
    results = newton_schulz_all(gathered, group["ns_steps"], group["polynomial"], _ns_dtype(group))
    return [shard_like(result, example) for result, example in zip(results, like, strict=True)]


def _add_slow(steps: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """O₁ + α O₂, in place in the list `steps`, in the type of the momenta."""
    for i, state in enumerate(states):
        steps[i] = steps[i].to(state["fast"].dtype)
        if group["slow_weight"]:
            steps[i] = steps[i].add(state["slow_output"], alpha=group["slow_weight"])


def _divide(steps: list[Tensor], second: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
    """Update V and divide by its root, in place in the list `steps`."""
    beta, eps = group["betas"][1], group["eps"]
    if group["accumulation"] == "ema":
        torch._foreach_mul_(second, beta)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta if group["accumulation"] == "ema" else beta)
    if group["eps_inside"]:
        root = torch._foreach_add(second, eps)
        torch._foreach_sqrt_(root)
    else:
        root = torch._foreach_sqrt(second)
        torch._foreach_add_(root, eps)
    steps[:] = torch._foreach_div(steps, root)


def _scaled(step: Tensor, group: dict[str, Any]) -> Tensor:
    """`step [m, n]` in the scale of `adjust`."""
    rows, columns = step.shape
    if group["adjust"] == "rms":
        norm = torch.linalg.vector_norm(step)
        return step.mul(RMS * math.sqrt(step.numel()) / norm.clamp(min=TINY))
    factors = {
        "none": 1.0,
        "original": math.sqrt(max(1.0, rows / columns)),
        "match_rms_adamw": RMS * math.sqrt(max(rows, columns)),
    }
    factor: float = factors[group["adjust"]]
    return step * factor
