"""Writing that survives a crash: bytes reach the disk before the name that promises them.

Every call that changes a disk goes through `os` here, one at a time, so that tests can end the process or fail the
disk at each of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGED = ".tmp"


def write_file(path: Path, data: bytes) -> None:
    """A file whose bytes are on the disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
    try:
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target`, whole or not at all, when the block ends.

    The parent must exist and `target` must not. What an error leaves is removed; what a crash leaves ends in
    `STAGED`, see `sweep`.
    """
    staged = target.with_name(target.name + STAGED)
    shutil.rmtree(staged, ignore_errors=True)
    try:
        os.mkdir(staged)
        yield staged
        sync_folder(staged)
        os.rename(staged, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a crash left half-written in a folder."""
    for path in folder.glob(f"*{STAGED}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
