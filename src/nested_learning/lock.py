"""A folder or file that one process at a time writes to.

The lock is the operating system's, on a file that stays open, so it ends with the process that holds it,
however that ends. On Linux this holds over NFS too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"
BUSY = (errno.EAGAIN, errno.EACCES)
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class InUseError(ValueError):
    """Another process writes there."""


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Inside, no other process gets past `locked` with the same path. The lock file is gone afterwards.

    Args:
        path: the lock file; made, with its folders, if it is not there. One that a dead process has left is
            taken over.
        what: what is locked, to begin a message with.

    Raises:
        InUseError: another process holds it; the message names host and process.
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = acquire(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is given up, so that it is ours that goes
        file.close()


def in_use(path: Path) -> bool:
    """Whether a process of this machine, or of one that shares the folder, holds the lock file at `path`.

    The lock is asked for and given back at once, shared. False where the file system has no locks.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in BUSY
    return False


def acquire(path: Path, what: str, forked: bool = True) -> BinaryIO:
    """The lock file, locked until it is closed or the process ends; see `locked`.

    Args:
        forked: processes forked from this one hold the lock too, until the last one ends.
    """
    file = _acquire(path, what, fcntl.flock if forked else fcntl.lockf)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    file.flush()
    return file


def _acquire(path: Path, what: str, lock: Callable[[BinaryIO, int], None]) -> BinaryIO:
    """The lock file, open and locked."""
    while True:
        file = path.open("a+b")
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().decode("utf-8", "replace").strip() or "another process"
            if error.errno in UNSUPPORTED:
                print(
                    f"{path}: no locks on this file system, let no other process write there", file=sys.stderr
                )
                return file
            file.close()
            if error.errno not in BUSY:
                raise
            raise InUseError(f"{what} is in use by {owner}; wait for it or stop it") from None
        if _is_at(file, path):
            return file
        file.close()  # its holder removed it between our opening and our locking


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether `path` still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
