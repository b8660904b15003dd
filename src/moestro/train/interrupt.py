"""Turning ctrl-C into a clean stop: the first asks, the second insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):
    """Raised by `Interrupt.check` at a point where the run can be saved."""


class Interrupt:
    """While it is entered, SIGINT and SIGTERM are remembered; `check` raises where stopping is safe.

    A second signal acts at once, as if this class did not exist. Outside the main thread, where Python allows no
    signal handlers, nothing is changed.

    Args:
        agree: the highest of the numbers that the processes of a run name; all of them stop when one is asked to.
            Such a process may get one wish twice, from the terminal and from whoever started it, so it takes the
            second for the first; who started it ends it if need be.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.signal_number: int | None = None
        self._agree = agree
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        if self._agree is not None:
            self.signal_number = self._agree(self.signal_number or 0) or None
        if self.signal_number is not None:
            raise StopRequested

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and self._agree is None:
            raise SystemExit(128 + number) if number == signal.SIGTERM else KeyboardInterrupt
        self.signal_number = number
