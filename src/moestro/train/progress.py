"""What a person sees of a run: a live display on a terminal, plain lines elsewhere; imports no torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, Literal, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from moestro.inspect.strip import load_strip

REFRESH_SECONDS = 0.25


class Progress(Protocol):
    """Is told what happens in a run."""

    def say(self, line: str) -> None:
        """A line to keep."""

    def begin(self, name: str, step: int, steps: int, log_every: int) -> None:
        """A model starts training, having done `step` of `steps` steps."""

    def step(self, record: Mapping[str, Any]) -> None:
        """A step is done; `record` is its line of metrics.jsonl."""

    def load(self, loads: Mapping[str, Sequence[float]]) -> None:
        """The load of every expert by layer, in any unit, now and then."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """An evaluation is done; `record` is its line of evaluations.jsonl."""

    def end(self) -> None:
        """The model that began is done, or the run is stopping."""


class Silent:
    """Says nothing."""

    def say(self, line: str) -> None: ...

    def begin(self, name: str, step: int, steps: int, log_every: int) -> None: ...

    def step(self, record: Mapping[str, Any]) -> None: ...

    def load(self, loads: Mapping[str, Sequence[float]]) -> None: ...

    def evaluated(self, record: Mapping[str, Any]) -> None: ...

    def end(self) -> None: ...


class Pace:
    """How far a model is and when it will be done."""

    def __init__(self, name: str, step: int, steps: int):
        self.name, self.first, self.steps = name, step, steps
        self.started = time.monotonic()

    def eta(self, step: int) -> str:
        """Time left as minutes and seconds, from the mean pace since the start."""
        done = step - self.first
        left = (time.monotonic() - self.started) / done * (self.steps - step) if done else 0.0
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class PlainLines:
    """One line per log interval, for pipes, files and terminals that ask for no colour."""

    def __init__(self, stream: IO[str] | None = None):
        self.stream = sys.stdout if stream is None else stream
        self._log_every = 1
        self._pace = Pace("", 0, 0)

    def say(self, line: str) -> None:
        print(line, file=self.stream, flush=True)

    def begin(self, name: str, step: int, steps: int, log_every: int) -> None:
        self._pace, self._log_every = Pace(name, step, steps), log_every

    def step(self, record: Mapping[str, Any]) -> None:
        step, pace = record["step"], self._pace
        if step % self._log_every == 0 or step == pace.steps:
            self.say(f"{pace.name} step {step}/{pace.steps} · {figures(record)} · {pace.eta(step)} left")

    def load(self, loads: Mapping[str, Sequence[float]]) -> None:
        """Left to the live display."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self.say(f"{self._pace.name} step {record['step']}/{self._pace.steps} · {validation(record)}")

    def end(self) -> None: ...


class LiveDisplay:
    """A bar with loss, tokens/s and time left, and under it the load of every layer's experts.

    The display is drawn by the training thread, a few times a second; no thread of its own takes a core.
    """

    def __init__(self, console: Console | None = None):
        self.console = Console(highlight=False, emoji=False) if console is None else console
        self._live: Live | None = None

    def say(self, line: str) -> None:
        self.console.print(Text(line))

    def begin(self, name: str, step: int, steps: int, log_every: int) -> None:
        self._pace, self._strips, self._drawn = Pace(name, step, steps), Text(), 0.0
        self._bar = Bar(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        self._task = self._bar.add_task(name, total=steps, completed=step, text="")
        self._live = Live(self._picture(), console=self.console, auto_refresh=False)
        self._live.start()

    def step(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        text = f"{step}/{self._pace.steps} · {figures(record)} · {self._pace.eta(step)} left"
        self._bar.update(self._task, completed=step, text=text)
        now = time.monotonic()
        if now - self._drawn >= REFRESH_SECONDS or step == self._pace.steps:
            self._drawn = now
            self._draw()

    def load(self, loads: Mapping[str, Sequence[float]]) -> None:
        lines = (f"  {name:<14} {load_strip(load)}" for name, load in loads.items())
        self._strips = Text("\n".join(lines), style="cyan")
        self._draw()

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self.say(f"{self._pace.name} step {record['step']}/{self._pace.steps} · {validation(record)}")

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _picture(self) -> Group:
        return Group(self._bar, self._strips)

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)


def figures(record: Mapping[str, Any]) -> str:
    """Loss and speed in a few words."""
    return f"loss {record['loss']:.4f} · {record['tokens_per_second']:,.0f} tokens/s".replace(",", " ")


def validation(record: Mapping[str, Any]) -> str:
    """What an evaluation found, in a few words."""
    return f"validation loss {record['validation_loss']:.4f} · {record['bits_per_byte']:.4f} bits per byte"


Telling = Literal["default", "plain", "silent"]


def progress_of(telling: Telling) -> Progress | None:
    """Who is told: as `default_progress`, which None stands for, plain lines on stderr, or nobody."""
    return Silent() if telling == "silent" else PlainLines(sys.stderr) if telling == "plain" else None


def default_progress() -> Progress:
    """The live display on a terminal; plain lines in a pipe, with NO_COLOR or on a terminal that cannot redraw."""
    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return PlainLines() if plain else LiveDisplay()
