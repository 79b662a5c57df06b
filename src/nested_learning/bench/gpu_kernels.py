"""Every Triton kernel against its token loop, on the card; what is not right is not used and not timed.

    python -m nested_learning.bench.gpu_kernels nested_learning.ops.delta_rule.triton cuda

A kernel that reads or writes where it must not ends every later use of the card by its process, so each
module is checked in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import torch

from nested_learning.bench.gpu_record import Budget, Entry, Record
from nested_learning.bench.gpu_settings import ARMS, PEERS, GpuSettings
from nested_learning.bench.timing import Progress
from nested_learning.ops import kernels

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest relative difference from the token loop, by the type of the inputs.

fp32: products run as three tf32 products each (tf32x3), which keep about 21 of 24 bits; the sums over a
chunk, its triangular inverse and the chunks in a row lose one or two decimal digits more. In Triton's
interpreter, whose products are those of fp32, the same kernels have to reach 1e-5. bf16: inputs have 8 bits,
so one rounding alone is 4e-3, and several stand in a row; products are in bf16, too, where they are under
autocast.
"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
USERS = {"delta_rule": ("linear",), "self_modifying": ("hope", "self_mod", "titans")}
"""Models that a kernel is for, by the package of its module. One that is not listed counts for all."""
MINUTE = 60.0


def check_kernels(settings: GpuSettings, record: Record, budget: Budget, progress: Progress) -> None:
    """Check all modules of `ops.kernels.MODULES` into the record; none where Triton cannot run."""
    reason = kernels.why_no_triton(torch.device(settings.device))
    if reason is not None:
        progress(f"kernels: none can be checked: {reason}")
        return
    for module in kernels.MODULES:
        if all(record.has(key_of(module, dtype)) for dtype in DTYPES):
            continue
        if not budget.fits(0):
            progress(f"kernels: no time for {module}")
            continue
        seconds = min(max(MINUTE, budget.left()), 2 * MINUTE)
        for dtype, entry in check_apart(module, settings.device, seconds).items():
            record.put(key_of(module, dtype), **entry)
            progress(f"kernel {rule_of(module)} {dtype}: {entry.get('why') or 'right'}")


def check_apart(module: str, device: str, seconds: float) -> dict[str, Entry]:
    """The checks of a module by type, made in a process that may die, of `seconds` at most."""
    command = [sys.executable, "-m", __name__, module, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        told, why = done.stdout, f"the process ended with code {done.returncode}: {done.stderr[-300:]}"
    except subprocess.TimeoutExpired as late:
        told = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        why = f"not done after {seconds:.0f} s"
    rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    found = {row.pop("dtype"): row for row in rows}
    return {
        dtype: found.get(dtype, {"status": "failed", "kernel": rule_of(module), "why": why})
        for dtype in DTYPES
    }


def check_module(module: str, device: str, dtype: str) -> Entry:
    """One check in this process: differences by name, and `why` it is not right, if it is not.

    Whatever a kernel raises is its result: the other kernels are checked all the same.
    """
    entry: Entry = {"kernel": rule_of(module), "dtype": dtype, "tolerance": TOLERANCES[dtype]}
    try:
        kernel: kernels.Kernel = import_module(module).KERNEL
        entry["kernel"] = kernel.name
        found = kernel.compare(torch.device(device), DTYPES[dtype])
    except Exception as error:  # of any kind: a compiler's, the driver's, ours
        words = " ".join(str(error).split())
        return {**entry, "status": "failed", "why": f"{type(error).__name__}: {words[:300]}"}
    entry["differences"] = found
    beyond = {name: value for name, value in found.items() if not value <= TOLERANCES[dtype]}  # NaN too
    if not found or beyond:
        worst = max(beyond, key=lambda name: (beyond[name] != beyond[name], beyond[name]), default="")
        why = f"{worst} is off by {beyond[worst]:.2g}" if beyond else "it compared nothing"
        return {**entry, "status": "failed", "why": why}
    return {**entry, "status": "done"}


def key_of(module: str, dtype: str) -> str:
    """Key of a check in the record."""
    return f"kernel {module} {dtype}"


def rule_of(module: str) -> str:
    """`delta_rule` of `nested_learning.ops.delta_rule.triton`."""
    return module.split(".")[-2] if "." in module else module


def modules_of(name: str) -> list[str]:
    """Modules whose kernels a model uses; none for the Transformer and for peers."""
    if name in PEERS or name not in ARMS or name == "transformer":
        return []
    return [module for module in kernels.MODULES if name in USERS.get(rule_of(module), ARMS)]


def distrust(name: str, record: Record) -> str | None:
    """Why no speed of a model with Triton kernels may be told, or None if all its kernels are right."""
    for module in modules_of(name):
        for dtype in DTYPES:
            entry = record.entries.get(key_of(module, dtype))
            if entry is None:
                return f"{rule_of(module)} has not been checked in {dtype}"
            if entry["status"] != "done":
                return f"{entry['kernel']} is wrong in {dtype}: {entry['why']}"
    return None


def with_kernels(settings: GpuSettings) -> frozenset[str]:
    """Models that have Triton kernels on this device."""
    if kernels.why_no_triton(torch.device(settings.device)) is not None:
        return frozenset()
    return frozenset(name for name in settings.models if modules_of(name))


def main() -> None:
    """Check one module in both types and print a line of JSON for each, as soon as it is known."""
    module, device = sys.argv[1:3]
    for dtype in DTYPES:
        print(json.dumps(check_module(module, device, dtype)), flush=True)


if __name__ == "__main__":
    main()
