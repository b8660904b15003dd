"""How a run can end before its last step; imports no torch."""

from __future__ import annotations

import signal


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became infinite or not a number; the optimiser step was not taken.

    Attributes:
        step: the step that failed, counted from 1.
        kind, name: what was bad first, and where, such as "weight" and "layers.7.moe.experts[13].down".
    """

    def __init__(self, message: str, step: int = 0, kind: str = "", name: str = ""):
        super().__init__(message)
        self.step, self.kind, self.name = step, kind, name


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written; names the file and, where it can, the tensor."""


class LostProcess(RuntimeError):
    """Another process of the run ended or fell silent."""


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
