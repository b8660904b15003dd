"""How a run can end before its last step; imports no torch."""

from __future__ import annotations

import signal


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became infinite or not a number; the optimiser step was not taken."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the run after a whole step and its state was saved.

    Attributes:
        step: optimiser steps done.
        exit_code: what the process should answer: 130 after ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, message: str, step: int, signal_number: int = signal.SIGINT):
        super().__init__(message)
        self.step = step
        self.exit_code = 128 + signal_number
