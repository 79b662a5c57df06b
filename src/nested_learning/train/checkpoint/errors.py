"""What goes wrong with checkpoints."""

from __future__ import annotations

import pickle
import sys


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written, and why, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


def cause(error: BaseException) -> str:
    """What began it, in one line: an error of the system inside, if there is one."""
    failures = getattr(error, "failures", None)  # of torch's CheckpointException, by rank
    inner: BaseException = next(iter(failures.values()))[0] if failures else error
    chain: BaseException | None = inner
    while chain is not None:
        if isinstance(chain, OSError):
            inner = chain
        chain = chain.__cause__ or chain.__context__
    if isinstance(inner, CheckpointError):
        return str(inner)
    if isinstance(inner, pickle.UnpicklingError) and "weights_only" in str(inner):
        return "it is damaged, or holds more than tensors and plain values"  # torch says how to load it still
    return f"{type(inner).__name__}: {inner}"


def note(line: str) -> None:
    """Say on stderr what is odd about a checkpoint and does not keep it from being used."""
    print(f"note: {line}", file=sys.stderr)
