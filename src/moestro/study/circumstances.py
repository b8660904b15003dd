"""When, where and with which code a study was made."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def circumstances(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The date, the commit of this code, the machine, and what the runs say of precision and versions."""
    first = results[0] if results else {}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
        "precision": first.get("precision"),
        "threads": first.get("threads"),
        "corpus": first.get("corpus"),
        "versions": first.get("versions", {}),
    }


def commit() -> str | None:
    """The commit of the checkout that this code runs from, `+` if files differ from it; None if it is not one."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + (
            "+" if git("status", "--porcelain", "--", str(folder)) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The name of the processor as its maker writes it, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
