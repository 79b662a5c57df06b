"""How many kernels a run starts: counted by the profiler on a card, by the dispatcher anywhere else.

On a CPU every operation that the dispatcher calls is counted, without those that only make a view or room for
a result. On a card each of them is at least one kernel. Triton kernels can be counted there too: they are
started and not run, so that only their number is right. What `torch.compile` makes of operations is not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nested_learning.bench.timing import Run
from nested_learning.ops import kernels
from nested_learning.train.objective import next_token_loss

NO_KERNEL = frozenset(
    [
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"),
        *("_unsafe_view", "lift_fresh", "_local_scalar_dense", "promote_types"),
        "inverse_unit_lower",
    ]
)
"""Operations that make room or change a shape, beside those that the dispatcher knows as views; and ours,
whose Triton kernel is counted by its own name."""
STARTS = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
"""Calls of the host that start a kernel or a graph; their variants begin with these names."""


@dataclass(frozen=True)
class Dispatches:
    """Operations of a training step that are kernels on a card, by direction, and all of them by name."""

    forward: int
    backward: int
    names: dict[str, int]

    @property
    def total(self) -> int:
        """Of both directions."""
        return self.forward + self.backward


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by name while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _starts_of_triton(names: Counter[str]) -> Iterator[None]:
    """Memories take their Triton kernels, on any device; these are counted by name and leave no result."""
    from triton.runtime.jit import JITFunction

    def start(self: Any, *arguments: Any, **options: Any) -> None:
        names[f"triton {self.fn.__name__}"] += 1

    held = JITFunction.run, kernels.why_no_triton, kernels.right, kernels.chosen()
    JITFunction.run, kernels.why_no_triton = start, lambda device: None
    kernels.right = lambda *about: True
    kernels.use_kernels("auto")
    try:
        yield
    finally:
        JITFunction.run, kernels.why_no_triton, kernels.right, choice = held
        kernels.use_kernels(choice)


def count_dispatches(model: nn.Module, tokens: Tensor, triton: bool = False) -> Dispatches:
    """Kernels of a training step (forward pass, loss, backward pass) on `tokens [B, T + 1]`.

    The number does not depend on widths, nor on B from 2 on (one row needs no copies to be rearranged), so
    that a narrow model tells it for a wide one.

    Args:
        model: on the CPU.
        tokens: of two rows or more.
        triton: on the path of our Triton kernels, where a memory has one; gradients then mean nothing.
    """
    path = _starts_of_triton if triton else nullcontext
    model.zero_grad(set_to_none=True)
    with _Counting() as forward, path(forward.names):
        loss = next_token_loss(model(tokens[:, :-1])[0], tokens[:, 1:])
    with _Counting() as backward, path(backward.names):
        loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    names = dict((forward.names + backward.names).most_common())
    return Dispatches(forward.names.total(), backward.names.total(), names)


def count_stored(model: nn.Module, tokens: Tensor, triton: bool = False) -> int:
    """Bytes that the forward pass of `tokens [B, T + 1]` stores for the backward pass, under bf16 autocast.

    A tensor that several operations store counts once, and parameters do not. Nothing is compiled.

    Args:
        model: on the CPU, as large as the one that is asked about.
        tokens: of any number of rows.
        triton: on the path of our Triton kernels, where a memory has one.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, tuple[int, Tensor]] = {}  # the tensor too, so that its room is not given to another

    def store(t: Tensor) -> Tensor:
        room = t.untyped_storage()
        if room.data_ptr() not in parameters:
            held[room.data_ptr()] = room.nbytes(), t
        return t

    path = _starts_of_triton(Counter()) if triton else nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(store, lambda t: t)
    with path, hooks, torch.autocast(tokens.device.type, torch.bfloat16):
        next_token_loss(model(tokens[:, :-1])[0], tokens[:, 1:])
    return sum(size for size, _ in held.values())


@torch.no_grad()
def count_decoded(model: nn.Module, tokens: Tensor) -> int:
    """Kernels of one more token after `tokens [B, T]`, on a carried state."""
    state = model(tokens)[1]
    with _Counting() as counting:
        model(tokens[:, :1], state)
    return int(counting.names.total())


def count_run(run: Run, device: str) -> tuple[int, int]:
    """Kernels of one call of `run`, and how often the host started a kernel or a graph for them."""
    if not device.startswith("cuda"):
        with _Counting() as counting:
            run()
        return counting.names.total(), counting.names.total()
    return count_events(profiled(run, device))


def profiled(run: Run, device: str) -> Any:
    """The profile of one call of `run`."""
    activities = [ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities) as made:
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
    return made


def count_events(made: Any) -> tuple[int, int]:
    """Kernels, and starts by the host, of a profile on a card.

    Copies and fills by the driver are no kernels.
    """
    kernels = starts = 0
    for event in made.events():
        if event.device_type == DeviceType.CUDA:
            kernels += not (event.is_user_annotation or event.name.startswith(("Memcpy", "Memset")))
        else:
            starts += event.name.startswith(STARTS)
    return kernels, starts


def write_profile(run: Run, device: str, folder: Path, trace: bool) -> None:
    """Profile one call of `run` into `folder`: `profile.txt`, its costliest rows, and with `trace` also
    `trace.json.gz` for a viewer of Chrome traces."""
    made = profiled(run, device)
    key = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    table = made.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80)
    (folder / "profile.txt").write_text(table + "\n")
    if trace:
        made.export_chrome_trace(str(folder / "trace.json.gz"))
