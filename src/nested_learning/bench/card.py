"""What a CUDA card is and can do, and whether our kernels are right on it; `nl doctor` prints it.

All of it was tested with a card that only pretends; it has not run on one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from nested_learning.bench.gpu_kernels import check_apart, rule_of
from nested_learning.bench.machine import best_seconds
from nested_learning.ops.kernels import MODULES, chosen, use_triton, why_no_triton

PRODUCT = 8192
"""Side of the matrices whose product is timed: a product of that size fills a card for a millisecond."""
COPIED = 2**28
"""Bytes that are copied: more than any cache holds."""
PATIENCE = 300.0
"""Seconds for all checks of one module of kernels, which are compiled first."""
DRIVER = Path("/proc/driver/nvidia/version")


def report(device: torch.device) -> tuple[list[str], list[str]]:
    """Lines about the cards of this machine, rates of one of them, and our kernels on it; and what is wrong.

    Args:
        device: the card that is measured. On another device than CUDA there is one line, about kernels.
    """
    if device.type != "cuda":
        return [f"kernels   {picked(device)}"], []
    count = torch.cuda.device_count()
    lines = [f"card      {describe_card(number)}" for number in range(count)]
    lines += [f"versions  {versions()}"]
    problems = []
    if count > 1 and not torch.distributed.is_nccl_available():
        problems.append(f"{count} cards, but this torch has no NCCL: several of them cannot train together")
    try:
        lines += [f"rates     {rates(device)}"]
    except RuntimeError as error:  # no code for this card, no memory left, a card in a bad state
        problems.append(f"{device} cannot compute: {first_line(error)}")
        return lines, problems
    lines += [f"kernels   {picked(device)}"]
    for name in MODULES if why_no_triton(device) is None else ():
        told, wrong = check_kernel(name, device)
        lines += [f"kernel    {told}"]
        problems += wrong
    return lines, problems


def describe_card(number: int) -> str:
    """Name, memory, compute capability and multiprocessors of card `number`."""
    card = torch.cuda.get_device_properties(number)
    return (
        f"cuda:{number}, {card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability "
        f"{card.major}.{card.minor}, {card.multi_processor_count} multiprocessors"
    )


def versions() -> str:
    """Versions of the driver, and of the CUDA, cuDNN and NCCL of this torch."""
    nccl = "no NCCL"
    if torch.distributed.is_nccl_available():
        numbers = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        nccl = f"NCCL {'.'.join(map(str, numbers))}"
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return f"driver {driver_version()}, CUDA {torch.version.cuda}, cuDNN {cudnn}, {nccl}"


def driver_version() -> str:
    """Version of the kernel's driver as Linux tells it, such as "580.65.06"."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", DRIVER.read_text()) if DRIVER.is_file() else None
    return found.group() if found else "unknown"


def rates(device: torch.device) -> str:
    """Rates of a large product in bfloat16 and of copies. A copy inside the card counts both ways."""
    a = torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    product = 2 * PRODUCT**3 / best_seconds(lambda: torch.mm(a, a, out=b), str(device))
    host = torch.ones(COPIED // 4).pin_memory()
    there = torch.empty(COPIED // 4, device=device)
    other = torch.empty_like(there)
    up = COPIED / best_seconds(lambda: there.copy_(host, non_blocking=True), str(device))
    inside = 2 * COPIED / best_seconds(lambda: other.copy_(there), str(device))
    return (
        f"{product / 1e12:.0f} TFLOP/s (bfloat16, {PRODUCT} x {PRODUCT} x {PRODUCT}), copies "
        f"{up / 1e9:.0f} GB/s from pinned memory, {inside / 1e9:.0f} GB/s inside the card"
    )


def picked(device: torch.device) -> str:
    """Which implementation the switch picks for tensors on `device`, and why not the other one."""
    if use_triton(device):
        return f"triton ({chosen()})"
    return f"torch: {why_no_triton(device) or 'chosen'}"


def check_kernel(module: str, device: torch.device) -> tuple[str, list[str]]:
    """The kernels of a module against their token loop: a line, and what is wrong.

    They run in a process of their own: one that reads where it must not ends every later use of a card.
    """
    found = check_apart(module, str(device), PATIENCE)
    wrong = [
        f"kernel {entry['kernel']} is wrong in {dtype}: {entry['why']}"
        for dtype, entry in found.items()
        if entry["status"] != "done"
    ]
    told = ", ".join(f"{dtype} {_largest(entry)}" for dtype, entry in found.items())
    return f"{rule_of(module)}: {told}", wrong


def _largest(entry: dict[str, Any]) -> str:
    """The largest difference of a check, or that there is none."""
    if entry["status"] != "done":
        return "wrong"
    return f"off by at most {max(entry['differences'].values()):.1e}"


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")
