"""Runs job files in processes of their own, some at a time, and stops them cleanly; imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.study.worker import FAILED
from moestro.train.files import write_json
from moestro.train.interrupt import Interrupt

STOPPED = (130, 143, -2, -15)
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Work:
    """One job for a worker.

    Attributes:
        name: for the display.
        file: where its description goes.
        content: the description; see `moestro.study.worker`.
        log: what the worker prints goes there.
        threads: processor threads that it may use; 0 leaves it open.
    """

    name: str
    file: Path
    content: dict[str, Any]
    log: Path
    threads: int = 0


@dataclass
class _Running:
    work: Work
    process: subprocess.Popen[bytes]
    started: float


def run_all(
    work: Iterable[Work],
    workers: int,
    interrupt: Interrupt,
    started: Callable[[str], None],
    ended: Callable[[str, float], None],
) -> bool:
    """Do all the work, `workers` at a time; False if a signal stopped it.

    Work that fails without a word of its own (a crash, a kill) gets its failure written here.

    Args:
        work: in the order in which it starts.
        workers: processes at a time.
        interrupt: told of signals; workers get time to save.
        started: is told the name of work that starts.
        ended: is told the name of work that ended, and the seconds that it took.
    """
    waiting, running = list(work), list[_Running]()
    try:
        while (waiting or running) and interrupt.signal_number is None:
            while waiting and len(running) < workers:
                running.append(_start(waiting.pop(0)))
                started(running[-1].work.name)
            time.sleep(POLL_SECONDS)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                _settle(one)
                ended(one.work.name, time.monotonic() - one.started)
        return interrupt.signal_number is None
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
            _close(one)


def _start(work: Work) -> _Running:
    work.file.parent.mkdir(parents=True, exist_ok=True)
    write_json(work.file, work.content)
    environment = dict(os.environ)
    if work.threads:
        environment["OMP_NUM_THREADS"] = str(work.threads)
    with open(work.log, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moestro.study.worker", str(work.file)],
            stdin=subprocess.PIPE,  # closes when this process dies, and the worker ends
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # ctrl-C reaches this process, which passes it on
        )
    return _Running(work, process, time.monotonic())


def _settle(one: _Running) -> None:
    """Close what belongs to an ended process; write down a crash that it could not tell of itself."""
    _close(one)
    code, failure = one.process.returncode, Path(one.work.content["failure"])
    if code in (0, *STOPPED):
        return
    if code != FAILED or not failure.is_file():
        write_json(failure, {"problem": f"its process ended with {_ending(code)}{_last_line(one.work.log)}"})


def _close(one: _Running) -> None:
    if one.process.stdin is not None:
        one.process.stdin.close()
    one.work.file.unlink(missing_ok=True)


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f": {lines[-1].strip()}" if lines else ""
