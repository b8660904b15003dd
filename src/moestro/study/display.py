"""What a person sees of a study: a table on a terminal, one line per training elsewhere; imports no torch."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import IO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

LAST = 12


class Display:
    """Is told what starts and ends in a study.

    Args:
        stream: where to print; None = stdout.
        quiet: print nothing.
    """

    def __init__(self, stream: IO[str] | None = None, *, quiet: bool = False):
        self.stream = sys.stdout if stream is None else stream
        self.quiet = quiet
        plain = not self.stream.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self._console = None if plain or quiet else Console(file=self.stream, highlight=False, emoji=False)
        self._live: Live | None = None
        self._running: dict[str, float] = {}
        self._last: deque[tuple[str, str, float]] = deque(maxlen=LAST)

    def say(self, line: str) -> None:
        """A line to keep."""
        if self._console is not None:
            self._console.print(Text(line))
        elif not self.quiet:
            print(line, file=self.stream, flush=True)

    def begin(self, task: str, done: int, total: int, workers: int) -> None:
        """A phase begins: `done` of `total` were done before, `workers` go on at a time."""
        self._task, self._before, self._done, self._total = task, done, done, total
        self._started = time.monotonic()
        if total > done:
            before = f", {done} done before" if done else ""
            self.say(f"{task}: {total} in all{before}, {workers} at a time")
        if self._console is not None:
            self._live = Live(self._picture(), console=self._console, auto_refresh=False)
            self._live.start()

    def started(self, name: str) -> None:
        """A training has started."""
        self._running[name] = time.monotonic()
        self._draw()

    def ended(self, name: str, seconds: float, outcome: str) -> None:
        """A training has ended."""
        self._running.pop(name, None)
        self._done += 1
        self._last.append((name, outcome, seconds))
        if self._console is None:
            self.say(f"{self._done}/{self._total} · {name} · {outcome} · {seconds:.0f} s · {self._left()} left")
        self._draw()

    def end(self) -> None:
        """The phase is over."""
        self._running.clear()
        self._draw()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left(self) -> str:
        """Time left, from the mean pace of this phase."""
        done = self._done - self._before
        left = (time.monotonic() - self._started) / done * (self._total - self._done) if done else 0.0
        minutes, seconds = divmod(round(left), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"

    def _picture(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for title in (self._task, "outcome", "seconds"):
            table.add_column(title, justify="right" if title == "seconds" else "left")
        for name, outcome, seconds in self._last:
            table.add_row(
                Text(name), Text(outcome, "red" if outcome.startswith("FAILED") else ""), f"{seconds:.0f}"
            )
        for name, since in self._running.items():
            table.add_row(Text(name, "cyan"), Text("running", "cyan"), f"{time.monotonic() - since:.0f}")
        left = f" · {self._left()} left" if self._done > self._before else ""
        return Group(table, Text(f"{self._done} of {self._total}{left}", "bold"))

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
