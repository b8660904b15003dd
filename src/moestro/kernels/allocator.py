"""Memory that stays with the process between steps."""

from __future__ import annotations

import ctypes
import sys

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # names of glibc's mallopt, malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed, so that the next step need not fault it in again; for a whole process.

    glibc maps every block from 32 MB up afresh and the kernel then clears it page by page, 0.15 ms per MB: for a
    bank's weight gradients as long as a third of a step. The process stays as large as it ever was.

    Returns: whether it was possible (glibc on Linux).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
