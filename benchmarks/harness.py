"""What every benchmark shares: interleaved runs, medians, ratios in one process, a table and a JSON file.

A benchmark builds the steps that compete, runs them by `interleaved`, and adds one row per case to a `Report`:

    def main() -> None:
        report = Report("layer", parse(__doc__))
        seconds = interleaved({"dense": dense, "moestro": bank}, report.repeat)
        report.add(shape="OLMoE / 2", tokens=512, ratio=seconds["dense"] / seconds["moestro"])
        report.finish()

Speed is only ever a ratio of steps that took turns: a busy neighbour then hits all of them alike.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

Step = Callable[[], Any]
PLACES = ("--json", "--folder")


def parse(description: str | None, *, repeat: int = 9, **options: Any) -> argparse.Namespace:
    """The arguments that all benchmarks take, and one option per keyword (its default, False being a switch).

    Sets the threads.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of every product")
    parser.add_argument("--repeat", type=int, default=repeat, help="rounds that are measured")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    for name, default in options.items():
        kind: dict[str, Any] = {"action": "store_true"} if default is False else {"type": type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **kind)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def interleaved(
    steps: Mapping[str, Step], repeat: int, warm_up: int = 2, each_round: Step | None = None
) -> dict[str, float]:
    """Median seconds of each step; every round runs `each_round`, then each step once, in turn."""
    times = all_times(steps, repeat, warm_up, each_round)
    return {name: median(each) for name, each in times.items()}


def all_times(
    steps: Mapping[str, Step], repeat: int, warm_up: int = 2, each_round: Step | None = None
) -> dict[str, list[float]]:
    """Seconds of each step in each of `repeat` rounds, after `warm_up` rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm_up + repeat):
        if each_round is not None:
            each_round()
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def profiled(step: Step, **options: Any) -> Any:
    """The record of torch's profiler over a step; the lines that the profiler itself writes are not shown."""
    from torch.profiler import ProfilerActivity, profile

    record = profile(activities=[ProfilerActivity.CPU], **options)
    with _silent_errors():
        record.__enter__()
    try:
        step()
    finally:
        with _silent_errors():
            record.__exit__(None, None, None)
    return record


@contextmanager
def _silent_errors() -> Iterator[None]:
    """Lead the process' standard error nowhere: native code writes there past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peer(module: str, what: str = "its rows") -> Any | None:
    """A library to compare with, or None after one line that says it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        print(f"{module} is not installed: {what} are left out", flush=True)
        return None


def machine() -> dict[str, Any]:
    """Processor model, cores, and the versions that decide speed."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that was measured, with a plus if files were changed since; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


class Report:
    """The rows of one benchmark: printed as they come, written as JSON at the end.

    Args:
        name: of the benchmark, as its file.
        arguments: from `parse`.
    """

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.arguments, self.repeat = name, arguments, arguments.repeat
        self.rows: list[dict[str, Any]] = []
        self._columns: list[str] = []
        facts = machine()
        where = facts.get("gpu", facts["processor"])
        print(f"{where}, {facts['cores']} cores, torch {facts['torch']}, {arguments.threads} threads")

    def add(self, **row: Any) -> None:
        """Print a row and keep it; None is printed as a dash."""
        self.rows.append(row)
        if list(row) != self._columns:
            self._columns = list(row)
            print("\n" + "  ".join(f"{name:>{_wide(name)}}" for name in row))
        print("  ".join(f"{show(value):>{_wide(name)}}" for name, value in row.items()), flush=True)

    def finish(self) -> None:
        """Write the JSON file, if one was asked for."""
        if self.arguments.json is None:
            return
        self.arguments.json.write_text(json.dumps(self.document(), indent=1) + "\n")

    def document(self) -> dict[str, Any]:
        """The rows, with all that one needs to run them again."""
        return {
            "benchmark": self.name,
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "machine": machine(),
            "threads": self.arguments.threads,
            "repeat": self.repeat,
            "command": " ".join(["python", f"benchmarks/{self.name}.py", *_portable(sys.argv[1:])]),
            "rows": self.rows,
        }


def _portable(words: list[str]) -> list[str]:
    """The arguments without those that name places of this machine."""
    kept = []
    for before, word in pairwise(["", *words]):
        if word.split("=")[0] not in PLACES and before not in PLACES:
            kept.append(word)
    return kept


def _wide(name: str) -> int:
    return max(9, len(name), 18 * (name in ("shape", "case", "layer")))


def show(value: Any) -> str:
    """A value as a table shows it: three figures for numbers, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if 0.1 <= abs(value) < 100 else f"{value:.3g}"
    return str(value)


def markdown(document: Mapping[str, Any]) -> str:
    """The tables of one JSON document, a new one wherever the columns change."""
    lines, columns = [f"## {document['benchmark']}", "", f"`{document['command']}`"], None
    for row in document["rows"]:
        if list(row) != columns:
            columns = list(row)
            lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines.append("| " + " | ".join(show(value) for value in row.values()) + " |")
    return "\n".join([*lines, ""])
