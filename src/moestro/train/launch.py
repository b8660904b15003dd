"""Starting the processes of a run on this computer, and ending all when one of them ends badly.

The processes meet in a file and talk over the loopback device, so nothing listens on the network. Each ends when
its standard input closes: a run whose starter was killed leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moestro.train.errors import LostProcess, NonFiniteLoss, Stopped
from moestro.train.interrupt import Interrupt
from moestro.train.progress import Telling
from moestro.train.recipe import Recipe

GRACE = 10.0  # seconds for the other processes to say why they end, once one has ended badly
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_KINDS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError, "LostProcess": LostProcess}


def launch_run(
    recipe: Recipe,
    out: str | Path,
    processes: int,
    *,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    progress: Telling = "default",
) -> dict[str, Any]:
    """Train what a recipe describes in several processes of this computer; otherwise like `train_run`.

    A process that dies ends the others within seconds, in one message that names it; what was saved stays. Signals
    to this process reach all of them: the first finishes the step and saves, the second ends all at once.

    Args:
        recipe: what to do; `recipe.parallel` says how the processes share it.
        out: folder of the run.
        processes: how many; CPU threads are shared out unless the recipe names them.
        resume: see `train_run`; a run may go on with another number of processes.
        overwrite: see `train_run`.
        progress: what the first process tells: as `train_run`, plain lines on stderr, or nothing.

    Raises:
        ValueError, NonFiniteLoss, Stopped: see `train_run`.
        LostProcess: a process died or fell silent.
    """
    if processes < 1:
        raise ValueError(f"processes={processes}; pass at least 1")
    job: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "out": str(out),
        "resume": resume,
        "overwrite": overwrite,
    }
    job |= {"progress": progress, "processes": processes}
    with tempfile.TemporaryDirectory(prefix="moestro-") as place, Interrupt() as interrupt:
        folder = Path(place)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        started = [_start(folder, rank, processes) for rank in range(processes)]
        try:
            _wait(started, interrupt)
        finally:
            _end(started)
        return _outcome(folder, started, Path(out))


def called_by_torchrun() -> bool:
    """Whether the environment names a rank, as torchrun and its kin set it."""
    return all(name in os.environ for name in _TORCHRUN)


@dataclass
class _Process:
    """One process of a run.

    Attributes:
        rank: its place.
        popen: the process.
        ended_by_us: whether it was told to end, so that how it ended says nothing.
        ended: when it was seen to have ended, in the order of `time.monotonic`.
    """

    rank: int
    popen: subprocess.Popen[bytes]
    ended_by_us: bool = False
    ended: float = float("inf")

    @property
    def bad(self) -> bool:
        return self.popen.returncode not in (None, 0) and not self.ended_by_us


def _start(folder: Path, rank: int, processes: int) -> _Process:
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    words = [sys.executable, "-m", "moestro.train.worker", str(folder), str(rank)]
    return _Process(rank, subprocess.Popen(words, stdin=subprocess.PIPE, env=environment))


def _wait(started: Sequence[_Process], interrupt: Interrupt) -> None:
    """Until all have ended, or one badly and the others had time to say why they end, too."""
    told, first_bad = False, float("inf")
    while any(each.popen.poll() is None for each in started):
        now = time.monotonic()
        for each in started:
            if each.popen.returncode is not None:
                each.ended = min(each.ended, now)
        if interrupt.signal_number is not None and not told:
            told = True
            for each in started:
                with suppress(BrokenPipeError, OSError):
                    assert each.popen.stdin is not None
                    each.popen.stdin.write(f"{interrupt.signal_number}\n".encode())
                    each.popen.stdin.flush()
        if any(each.bad for each in started):
            first_bad = min(first_bad, now)
            killed = any((each.popen.returncode or 0) < 0 for each in started)
            if killed or now > first_bad + GRACE:  # of the killed one nobody has more to say
                return
        time.sleep(0.02)
    for each in started:
        each.ended = min(each.ended, time.monotonic())


def _end(started: Sequence[_Process]) -> None:
    """End what still runs."""
    for each in started:
        if each.popen.poll() is None:
            each.ended_by_us = True
            each.popen.kill()
    for each in started:
        each.popen.wait()
        with suppress(BrokenPipeError, OSError):
            assert each.popen.stdin is not None
            each.popen.stdin.close()


def _outcome(folder: Path, started: Sequence[_Process], out: Path) -> dict[str, Any]:
    """The result of the first process, or the error of the one that ended badly first."""
    reports = {each.rank: _report(folder, each.rank) for each in started}
    killed = [each for each in started if each.bad and each.popen.returncode < 0]
    if killed:
        raise LostProcess(_death(killed[0], len(started), out))
    told = [report for report in reports.values() if report.get("kind") not in (None, "result")]
    if told:  # of those that name a reason, not just the loss of another
        first = min(told, key=lambda report: (report["kind"] == "LostProcess", report["rank"]))
        if sum(report["message"] == first["message"] for report in told) == 1 < len(started):
            whose = f"rank {first['rank']}: "
            first["message"] = whose + first["message"].removeprefix(whose)
        raise _error(first)
    bad = sorted((each for each in started if each.bad), key=lambda each: each.ended)
    if bad:
        code = bad[0].popen.returncode
        raise LostProcess(f"rank {bad[0].rank} (process {bad[0].popen.pid}) ended with exit code {code}; {_ADVICE}")
    result: dict[str, Any] = reports[0]["result"]
    return result


_ADVICE = "the others were ended; see what it said above, and go on with --resume"


def _report(folder: Path, rank: int) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return report | {"rank": rank}


def _death(dead: _Process, processes: int, out: Path) -> str:
    number = -dead.popen.returncode
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    why = ", perhaps by the system for want of memory" if name == "SIGKILL" else ""
    return (
        f"rank {dead.rank} (process {dead.popen.pid}) was ended by {name}{why}; the other {processes - 1} of "
        f"{processes} processes were ended, too; --resume goes on from the newest checkpoint in {out}"
    )


def _error(report: dict[str, Any]) -> BaseException:
    """What a process raised, as this one raises it."""
    message = report["message"]
    if report["kind"] == "Stopped":
        return Stopped(message, report["step"], report["signal"])
    if report["kind"] == "NonFiniteLoss":
        return NonFiniteLoss(message, report["step"], report["what"], report["name"])
    return _KINDS.get(report["kind"], RuntimeError)(message)
