"""What experts that are dear to fit or to ask remember from one EM step to the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from moestro.mixtures.numerics import Array


class Learned:
    """The rows, and the mass of each, that something was last learned from; forgotten by copies on disk."""

    def __init__(self, z: Array, mass: Array):
        self._rows: Callable[[], Array | None] = weakref.ref(z)
        self._mass = mass.copy()

    def moved(self, z: Array, mass: Array, part: float) -> bool:
        """Whether these are other rows, or more than a part of the mass is elsewhere by now."""
        return self._rows() is not z or bool(np.abs(mass - self._mass).sum() > part * mass.sum())

    def __reduce__(self) -> tuple[Any, ...]:
        return Learned, (_NONE, np.empty(0))


class Answers:
    """A function of rows that keeps its last answer, because EM asks about the same rows again and again.

    The rows are held weakly, and copies on disk keep neither them nor the answer.
    """

    def __init__(self, ask: Callable[[Array], Array]):
        self._ask = ask
        self._last: tuple[Callable[[], Array | None], Array] | None = None

    def __call__(self, z: Array) -> Array:
        last = self._last
        if last is None or last[0]() is not z:
            last = self._last = weakref.ref(z), self._ask(z)
        return last[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return Answers, (self._ask,)


_NONE = np.empty(0)
