"""Where the time of a run went: steps that count, and everything else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PARTS = ("productive", "data", "evaluation", "checkpoint", "lost")


class Goodput:
    """Seconds by what they were spent on, over all the lives of a run.

        goodput = productive / (productive + data + evaluation + checkpoint + lost + other)

    Productive are the optimiser steps that are part of the result; lost are steps that a crash took back and the
    run did again. Loading, compiling and whatever nobody timed is "other".

    Args:
        before: seconds of the run's earlier lives, as a checkpoint keeps them.
    """

    def __init__(self, before: Mapping[str, float] | None = None):
        self.seconds = dict.fromkeys(PARTS, 0.0) | dict(before or {})

    @contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """Count the time of the block as `part`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started

    def lose(self, seconds: float) -> None:
        """Steps that are done again: their first doing was in vain."""
        self.seconds["lost"] += seconds

    def summary(self, wall: float) -> dict[str, float]:
        """Seconds of each part, "other" to make up the wall time, and "share", the goodput itself."""
        wall = max(wall, sum(self.seconds.values()), 1e-9)
        other = wall - sum(self.seconds.values())
        seconds = {part: round(value, 3) for part, value in (self.seconds | {"other": other}).items()}
        return seconds | {"share": round(self.seconds["productive"] / wall, 4)}


def in_words(summary: Mapping[str, float]) -> str:
    """One line: `goodput 93.1 %: productive 120.1 s, data 0.2 s, ...`."""
    parts = ", ".join(f"{part} {summary[part]:.1f} s" for part in (*PARTS, "other"))
    return f"goodput {100 * summary['share']:.1f} %: {parts}"
