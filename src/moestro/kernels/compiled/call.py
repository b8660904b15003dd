"""A compiled step with the memory that it works on, run by all of torch's threads."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from moestro.kernels.compiled.availability import thread_functions


class Recorded(Protocol):
    """Anything that a record describes."""

    record: np.ndarray


class Call:
    """A step, its record, and what the record's addresses point to.

    Args:
        step: a compiled function of numba.
        dtype: of its record, eight bytes a field.
        threads: that run it.
        values: of fields: numbers, and tensors or described things for their addresses; None = 0.
    """

    def __init__(self, step: Any, dtype: np.dtype[Any], threads: int, **values: Any) -> None:
        self.record, self.kept = np.zeros(1, dtype), (step, values)
        for name, value in values.items():
            self.record[name] = _number(value)
        self.words = self.record.view(np.int64)
        self.arguments = (step.address, self.record.ctypes.data, threads, 0)
        self.run = _parallel()

    def __call__(self, *first: int) -> None:
        """Set the first fields of the record, and run."""
        self.words[: len(first)] = first
        self.run(*self.arguments)


def _number(value: Tensor | Recorded | float | None) -> float:
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.data_ptr()
    return value if isinstance(value, int | float) else int(value.record.ctypes.data)


@cache
def _parallel() -> Any:
    functions = thread_functions()
    assert functions is not None, "ask why_not() first"
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return prototype(functions["GOMP_parallel"])
