"""One training or one measurement of a study in a process of its own: `python -m moestro.study.worker JOB.json`.

A process per training keeps the others whole when one crashes. It ends when its standard input closes, so that a
study that was killed leaves nothing running.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from moestro.train.files import write_json

FAILED = 3


def main(job_file: str) -> int:
    """Do what a job file says; 0 done, 3 failed and said why, 130 or 143 stopped."""
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        _do(job)
    except KeyboardInterrupt as stop:
        return int(getattr(stop, "exit_code", 130))
    except Exception as error:
        traceback.print_exc()  # for the log
        write_json(Path(job["failure"]), {"problem": _sentence(error)})
        return FAILED
    return 0


def _do(job: dict[str, Any]) -> None:
    from moestro.study.circumstances import commit
    from moestro.study.speed import measure_speed
    from moestro.train import Recipe
    from moestro.train.progress import PlainLines
    from moestro.train.run import train_models

    recipe, out = Recipe.model_validate(job["recipe"]), Path(job["out"])
    if job["task"] == "speed":
        found = measure_speed(recipe, Recipe.model_validate(job["dense"]))
        write_json(out, found | {"commit": commit()})
        return
    resume = (out / "recipe.yaml").is_file()
    train_models(recipe, out, resume=resume, overwrite=False, progress=PlainLines(sys.stdout))


def _sentence(error: Exception) -> str:
    """The error as one line, with its class where the text alone would not say what happened."""
    line = " ".join(str(error).split()) or "no reason given"
    known = isinstance(error, ValueError | ArithmeticError) or type(error).__module__.startswith("moestro.")
    return line if known else f"{type(error).__name__}: {line}"


def _end_with_the_study() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock would still be held as the process ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
