"""Every Triton kernel against its token loop, on the card; what is not right is not used and not timed.

    python -m nested_learning.bench.gpu_kernels nested_learning.ops.delta_rule.triton cuda bf16

A kernel that reads or writes where it must not ends every later use of the card by its process, so each check
is made in a process of its own. They run side by side: almost all of their time is the compiler's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
USERS = {
    "cms": ("hope",),
    "delta_rule": ("linear",),
    "self_modifying": ("hope", "self_mod", "titans"),
}
"""Models that a kernel is for, by the package of its module. One that is not listed counts for all."""
MINUTE, MOST = 60.0, 240.0  # seconds of a check: two kernels took 40 s on an H100 with sixteen cores


def check_kernels(settings: GpuSettings, record: Record, budget: Budget, progress: Progress) -> None:
    """Check all modules of `ops.kernels.MODULES` into the record; none where Triton cannot run."""
    reason = kernels.why_no_triton(torch.device(settings.device))
    if reason is not None:
        progress(f"kernels: none can be checked: {reason}")
        return
    missing = [m for m in kernels.MODULES if not all(record.has(key_of(m, dtype)) for dtype in DTYPES)]
    if missing and not budget.fits(0):
        progress("kernels: no time left")
        return
    seconds = min(max(MINUTE, budget.left()), MOST)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda module: check_apart(module, settings.device, seconds), missing)
        for module, entries in zip(missing, found, strict=True):
            for dtype, entry in entries.items():
                record.put(key_of(module, dtype), **entry)
                progress(f"kernel {rule_of(module)} {dtype}: {entry.get('why') or 'right'}")


def check_apart(module: str, device: str, seconds: float) -> dict[str, Entry]:
    """The checks of a module by type, each made in a process that may die, of `seconds` at most."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda dtype: _check_in_process(module, device, dtype, seconds), DTYPES)
        return dict(zip(DTYPES, found, strict=True))


def _check_in_process(module: str, device: str, dtype: str, seconds: float) -> Entry:
    command = [sys.executable, "-m", __name__, module, device, dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if lines:
            entry: Entry = json.loads(lines[-1])
            return entry
        why = f"the process ended with code {done.returncode}: {done.stderr[-300:]}"
    except subprocess.TimeoutExpired:
        why = f"not done after {seconds:.0f} s"
    return {"status": "failed", "kernel": rule_of(module), "dtype": dtype, "why": why}


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
    """Make one check in this process and print it as a line of JSON."""
    module, device, dtype = sys.argv[1:4]
    print(json.dumps(check_module(module, device, dtype)), flush=True)


if __name__ == "__main__":
    main()
