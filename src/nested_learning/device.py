"""The device that a name such as "cuda:0" means, if this machine has it."""

from __future__ import annotations

import torch

KINDS = ("cpu", "cuda", "mps")


def check_device(name: str, field: str = "device") -> None:
    """Check that `name` is that of a device, on this machine or another.

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
    """Devices of a kind that can be used."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
