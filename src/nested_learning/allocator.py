"""Keep freed memory for the next step instead of returning it to the system (CPU, Linux with glibc)."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # names of mallopt(3)
MIB = 1 << 20


def keep_freed_memory() -> bool:
    """Ask glibc to reuse freed blocks of up to 32 MiB; whether it agreed (False on other systems).

    A training step frees and allocates the same blocks over and over. By default glibc gives each of them
    back to the system, and every page of the next one is faulted in again, which can cost more than the
    products themselves. Affects the whole process, so only entry points call it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((MMAP_THRESHOLD, 32 * MIB), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 64 * MIB))
    return all(mallopt(name, value) == 1 for name, value in settings)
