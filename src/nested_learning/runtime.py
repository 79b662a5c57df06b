"""Set-up of a process: its device, its random number generators and its allocator."""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any

import numpy as np
import torch

KINDS = ("cpu", "cuda", "mps")
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # names of mallopt(3)
MIB = 1 << 20


def check_device(name: str, field: str = "device") -> None:
    """Check that `name` names a device, which this machine need not have.

    Args:
        name: "auto", "cpu", "cuda", "cuda:0", "cuda:1", … or "mps".
        field: what to call it in the error.

    Raises:
        ValueError: another name.
    """
    if name != "auto":
        _parse(name, field)


def pick_device(name: str | torch.device, field: str = "device") -> torch.device:
    """The device called `name`; "auto" is CUDA if there is one, else the CPU.

    Args:
        name: see `check_device`.
        field: what to call it in the error.

    Raises:
        ValueError: another name, or a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = _parse(str(name), field)
    if device.type != "cpu" and (device.index or 0) >= _count(device.type):
        there = ["cpu", *(f"cuda:{i}" for i in range(_count("cuda"))), *["mps"] * _count("mps")]
        raise ValueError(f"{field} = {str(name)!r} is not on this machine; it has {', '.join(there)}")
    return device


def _parse(name: str, field: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in KINDS:
        raise ValueError(f"{field} must be auto, cpu, cuda, cuda:NUMBER or mps, got {name!r}")
    return device


def _count(kind: str) -> int:
    """Number of usable devices of a kind."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy, PyTorch and every CUDA device.

    A checkpoint can hold them: they are tensors and plain values only.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned.

    Every CUDA device that is here and was there gets its state back: a run goes on the same on a machine with
    more devices, or fewer. Devices that are new keep the state that they have; on a CPU, CUDA states are left
    out.
    """
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number, own in enumerate(state["cuda"][:here]):
        torch.cuda.set_rng_state(own, number)


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks of up to 32 MiB for the next allocation.

    A training step frees and allocates the same blocks over and over. By default glibc returns each of them
    to the system, and every page of the next one is faulted in again, which can cost more than the matrix
    products themselves. The setting affects the whole process, so only entry points call this function.

    Returns:
        Whether glibc accepted the settings; False on other systems.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((MMAP_THRESHOLD, 32 * MIB), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 64 * MIB))
    return all(mallopt(name, value) == 1 for name, value in settings)
