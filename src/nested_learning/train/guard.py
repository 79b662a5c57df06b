"""Numbers that are not finite: stop before they reach the parameters, and say where they began."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nested_learning.state import State


class NonFiniteError(RuntimeError):
    """A loss, a gradient, or a tensor that was to be saved is not finite."""

    exit_status = 1


class UpdateGuard:
    """Lets the optimizer update only if loss and gradient are finite.

    On a CPU, reading the flag costs nothing, so the answer is known at once. On CUDA, reading it in
    every step would make the host wait for the device. There the flag stays on the device: fused
    optimizers take it as `found_inf` (the mechanism of `torch.amp.GradScaler`) and leave parameters
    and moments alone while it is set. It stays set, so no later step updates either, and the host
    reads it at the next `check`. An optimizer without that mechanism pays for the wait.

    `made`, a scalar on the device, counts the updates that were made.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, deferred: bool | None = None) -> None:
        can_defer = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self.deferred = (device.type == "cuda" and can_defer) if deferred is None else deferred
        self.optimizer: Any = optimizer
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.made = torch.zeros((), dtype=torch.int64, device=device)

    def step(self, loss: Tensor, norm: Tensor) -> bool:
        """Update unless `loss` or `norm` (scalars) is not finite; False = known to be stopped."""
        self.bad |= ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.made += ~self.bad
        if self.deferred:
            self.optimizer.found_inf = self.bad.float()
            self.optimizer.step()
            del self.optimizer.found_inf
            return True
        if not self.check():
            return False
        self.optimizer.step()
        return True

    def check(self) -> bool:
        """Whether everything was finite so far. Waits for the device."""
        return not bool(self.bad)


def find_nonfinite(model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
    """Name the first tensor that is not finite, by running forward and backward again.

    Looks at parameters and buffers, then at module outputs in the order they are computed, then at
    the loss, then at parameter gradients in the order the backward pass makes them.

    Args:
        model: its gradients are overwritten.
        loss: computes the scalar loss of the step that went wrong.

    Returns:
        "parameter 'a.b'", "output of module 'a'", "loss" or "gradient of 'a.b'"; None if all is finite.
    """
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if not _finite(tensor):
                return f"{kind} {name!r}"
    model.zero_grad(set_to_none=True)
    with _watch_outputs(model) as outputs:
        value = loss()
    if outputs:
        return f"output of module {outputs[0]!r}"
    if not _finite(value):
        return "loss"
    with _watch_gradients(model) as gradients:
        value.backward()  # type: ignore[no-untyped-call]
    return f"gradient of {gradients[0]!r}" if gradients else None


def first_nonfinite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first floating tensor that holds a NaN or an infinity; None if all are finite.

    Waits once for each device. Of a sharded tensor, the part of this rank counts.
    """
    found: dict[torch.device, list[tuple[int, str, Tensor]]] = {}
    for place, (name, tensor) in enumerate(named):
        own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if own.is_floating_point() and own.numel():
            finite = torch.isfinite(torch.stack(own.detach().aminmax())).all()  # NaN is both; no copy
            found.setdefault(own.device, []).append((place, name, finite))
    bad = [
        (place, name)
        for entries in found.values()
        for (place, name, _), good in zip(entries, torch.stack([e[2] for e in entries]).tolist(), strict=True)
        if not good
    ]
    return min(bad)[1] if bad else None


@contextmanager
def _watch_outputs(model: nn.Module) -> Iterator[list[str]]:
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(_finite(t) for t in _tensors(output)):
                found.append(name)

        return hook

    handles = [m.register_forward_hook(watch(name or "model")) for name, m in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch_gradients(model: nn.Module) -> Iterator[list[str]]:
    found: list[str] = []

    def watch(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None and not _finite(parameter.grad):
                found.append(name)

        return hook

    trained: list[tuple[str, Any]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(watch(name)) for name, p in trained]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, State):
        return value.tensors()
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
