"""Threads that wait for the next parallel product without taking a core."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_SOFT = 1  # omp_pause_soft, OpenMP 5.0, section 3.2.44


def let_threads_sleep() -> None:
    """Send the threads of this thread's last parallel product to sleep; the next product wakes them.

    GNU's OpenMP lets them spin for milliseconds, on the core that another thread of ours is about to use: a bank of
    64 experts takes 80 instead of 71 ms at 512 tokens on 2 cores. Costs 0.2 ms. Nothing where the environment
    says how threads wait, or with another OpenMP.
    """
    pause = _pause()
    if pause is not None:
        pause(_SOFT)


@cache
def _pause() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux") or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        return None
    symbols = ctypes.CDLL(None)
    if hasattr(symbols, "kmp_set_blocktime"):  # Intel's and LLVM's
        return None
    return getattr(symbols, "omp_pause_resource_all", None)
