"""One number for all code of this room, so that compiled code that is kept on disk is never older than it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types


def sources() -> int:
    """Checksum of the files of this room."""
    total = 0
    for file in sorted(Path(__file__).parent.glob("*.py")):
        total = zlib.crc32(file.read_bytes(), total)
    return total


def compiled(step: Callable[..., None]) -> Any:
    """Machine code of a step, from numba's cache or for it; only for this process where no cache can be written.

    Args:
        step: a function inside a function that took `sources()`: numba compares what it encloses, and of files
            only the one that it stands in.
    """
    signature = types.void(types.voidptr)
    try:
        return numba.cfunc(signature, cache=True)(step)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return numba.cfunc(signature)(step)
