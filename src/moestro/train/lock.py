"""One writer for a run: a lock that the system takes back when its owner dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def writing(folder: Path) -> Iterator[int | None]:
    """Hold the folder's lock inside the block; the folder must exist.

    The lock is an advisory one of the system on `folder/.lock`, which holds the owner's process number. A process
    that dies, however suddenly, loses it, so a stale file never blocks a run.

    Yields: the number of a process that died without giving the lock back, or None.

    Raises:
        ValueError: another process writes this run; names it.
    """
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        before = os.read(descriptor, 32)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield int(before) if before.isdigit() else None
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """An open, locked descriptor of the file that `path` names now."""
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(descriptor, path):
                return descriptor
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise ValueError(
                f"{path.parent} is being written by process {owner}; wait for it, or pass another folder"
            ) from None
        os.close(descriptor)  # its owner removed the file between our two calls


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
