"""Our Triton kernels compiled for real cards, on a machine that has none."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Most shared memory of a program in bytes, by architecture (A100, H100)."""


@dataclass(frozen=True)
class Usage:
    """What a kernel takes: registers of a thread, bytes that spilled, bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int


def usage(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], arch: int, warps: int, stages: int = 1
) -> Usage:
    """Compile `kernel` for sm_`arch` and ask ptxas what it takes.

    Args:
        signature: types of the arguments by name, such as "*fp32" and "i32"; "constexpr" for constants.
        constants: values of the constants.
        arch: 80 or 90.
        warps, stages: of a program, and of the loads in its loops.
    """
    aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(made.asm["ptx"])
        command = [str(ptxas), "-v", f"-arch={name}", str(file), "-o", str(file.with_suffix(".cubin"))]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", told)[-1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", told)))
    return Usage(registers, spilled, made.metadata.shared)
