"""Peak memory of one training step, measured in a fresh process.

    python -m nested_learning.bench.memory '{"settings": {…}, "case": {…}, "batch": 4, "length": 1024}'

On a CPU it is the high-water mark of resident memory during the step minus the resident memory before it: the
parameters are not in it; activations, gradients and workspaces are. On CUDA it is the allocator's peak
minus what was allocated before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from nested_learning.bench.settings import BenchSettings, Case, build_model
from nested_learning.bench.steps import training_step
from nested_learning.bench.timing import Run
from nested_learning.models.compile import compile_model

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_in_subprocess(settings: BenchSettings, case: Case, batch: int, length: int) -> int:
    """Peak bytes of a training step of `case`.

    Raises:
        RuntimeError: if the process fails, for example for want of memory; with its last words.
    """
    request = {"settings": asdict(settings), "case": asdict(case), "batch": batch, "length": length}
    command = [sys.executable, "-m", "nested_learning.bench.memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"peak memory of {case.name} at length {length}, batch {batch}: the process ended with code "
            f"{done.returncode}: {done.stderr[-500:]}"
        )
    return int(done.stdout.split()[-1])


def peak_of_step(settings: BenchSettings, case: Case, batch: int, length: int) -> int:
    """Peak bytes of a training step in this process. A first step warms up what is made only once."""
    model = build_model(settings, case)
    if settings.compile:
        compile_model(model)
    warm = length if settings.compile else min(length, 2 * case.chunk)
    training_step(model, settings, batch, warm)()
    model.zero_grad(set_to_none=True)
    return measure_peak(training_step(model, settings, batch, length), settings.device)


def measure_peak(run: Run, device: str = "cpu") -> int:
    """Bytes by which memory rises during `run`, at its highest."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_pages()
    if CLEAR.exists() and os.access(CLEAR, os.W_OK):
        CLEAR.write_text("5")  # the high-water mark starts again from here
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status; elsewhere than on Linux, the highest so far for every field."""
    if not STATUS.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no field {field}")


def _return_free_pages() -> None:
    """Hand freed memory back to the system, or the step would reuse it unseen (glibc only)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def main() -> None:
    """Read one request from the command line and print the peak in bytes."""
    request = json.loads(sys.argv[1])
    settings = BenchSettings(**request["settings"])
    torch.set_num_threads(settings.threads)
    case = Case(**request["case"])
    print(peak_of_step(settings, case, request["batch"], request["length"]))


if __name__ == "__main__":
    main()
