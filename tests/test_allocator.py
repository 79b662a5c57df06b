"""Freed memory is reused: counted in page faults of a fresh process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from nested_learning.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(2**21)  # 8 MiB
for _ in range(5):
    y = [x + 1, x + 2]; del y
before = faults()
for _ in range(50):
    y = [x + 1, x + 2]; del y
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_blocks_are_not_faulted_in_again() -> None:
    def faults(mode: str) -> int:
        run = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults("keep") < 1000 < faults("return")
