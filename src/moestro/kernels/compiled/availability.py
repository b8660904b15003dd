"""Whether this process can compile, and the threads that compiled code runs on."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache

THREADS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")


@cache
def why_not() -> str | None:
    """Why compiled steps cannot run here, in a sentence that says what would help; None where they can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install 'moestro[fast]'"
    if thread_functions() is None:
        return "torch does not use GNU OpenMP here, and compiled steps share its threads; they run on Linux"
    return None


@cache
def thread_functions() -> dict[str, int] | None:
    """Addresses of the functions of the OpenMP that torch has loaded; None where it is not GNU's or speaks like it.

    A second OpenMP beside torch's would keep threads of its own, which spin on the same cores.
    """
    import torch  # noqa: F401  (loads its OpenMP)

    try:
        symbols = ctypes.CDLL(None)
        found = {name: getattr(symbols, name) for name in THREADS}
    except (AttributeError, OSError, TypeError):
        return None
    return {name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in found.items()}
