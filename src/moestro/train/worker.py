"""One process of a run of several: `python -m moestro.train.worker FOLDER RANK` for `launch_run`, or torchrun's."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moestro.train.errors import LostProcess
from moestro.train.files import write_json

if TYPE_CHECKING:
    from moestro.train.progress import Telling
    from moestro.train.recipe import Recipe

FAILED = 3


def main(place: str, rank: int) -> int:
    """Do the job of FOLDER and leave what came of it there; 0 done, 3 failed, 130 or 143 stopped."""
    threading.Thread(target=_listen, daemon=True).start()
    folder = Path(place)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    report, code = _attempt(folder, rank, job)
    write_json(folder / f"rank-{rank}.json", report)
    return code


def _attempt(folder: Path, rank: int, job: dict[str, Any]) -> tuple[dict[str, Any], int]:
    from moestro.train.errors import NonFiniteLoss, Stopped
    from moestro.train.team import is_silence

    try:
        return {"kind": "result", "result": _do(folder, rank, job)}, 0
    except Stopped as stop:
        signal_number = stop.exit_code - 128
        return {"kind": "Stopped", "message": str(stop), "step": stop.step, "signal": signal_number}, stop.exit_code
    except KeyboardInterrupt:
        return {"kind": "Stopped", "message": "stopped", "step": 0, "signal": signal.SIGINT}, 130
    except NonFiniteLoss as error:
        said = {"message": str(error), "step": error.step, "what": error.kind, "name": error.name}
        return {"kind": "NonFiniteLoss", **said}, FAILED
    except Exception as error:
        if is_silence(error):
            message = f"rank {rank} lost another process: {_loss(error)}"
            return {"kind": "LostProcess", "message": message}, FAILED
        known = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("moestro.")
        if not known or os.environ.get("MOESTRO_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        kind = next((each.__name__ for each in (ValueError, OSError) if isinstance(error, each)), "")
        return {"kind": kind or "RuntimeError", "message": _line(error)}, FAILED


def _do(folder: Path, rank: int, job: dict[str, Any]) -> dict[str, Any] | None:
    from moestro.train.progress import Silent, progress_of
    from moestro.train.recipe import Recipe
    from moestro.train.run import train_run
    from moestro.train.team import joined_by_file

    recipe = Recipe.model_validate(job["recipe"])
    progress = progress_of(job["progress"]) if rank == 0 else Silent()
    how = {"resume": job["resume"], "overwrite": job["overwrite"], "progress": progress}
    with joined_by_file(folder / "meet", rank, job["processes"], recipe.parallel.timeout) as team:
        return train_run(recipe, job["out"], **how, team=team)


def run_as_member(
    recipe: Recipe, out: Path, *, resume: bool | Literal["auto"], overwrite: bool, telling: Telling
) -> dict[str, Any] | None:
    """Train as one of the processes that torchrun started; the result in the first of them, elsewhere None.

    What all processes refuse alike, the first says alone.

    Raises: see `moestro.train.train_run`; LostProcess when another process ended.
    """
    from moestro.train.progress import Silent, progress_of
    from moestro.train.run import train_run
    from moestro.train.team import is_silence, joined_from_environment

    with joined_from_environment(recipe.parallel.timeout) as team:
        progress = progress_of(telling) if team.first else Silent()
        try:
            return train_run(recipe, out, resume=resume, overwrite=overwrite, progress=progress, team=team)
        except RuntimeError as error:
            if is_silence(error):
                first = "torchrun says below which rank ended first"
                raise LostProcess(f"rank {team.rank} lost another process: {_loss(error)}; {first}") from None
            raise


def _listen() -> None:
    """Signals come as lines on standard input; its end means that the starter is gone, and so are we."""
    for line in sys.stdin:
        os.kill(os.getpid(), int(line))
    os._exit(FAILED)


def _line(error: Exception) -> str:
    """The error as one line, with its class where the text alone would not say what happened."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    line = " ".join(text.split()) or "no reason given"
    known = isinstance(error, ValueError | OSError | RuntimeError)
    return line if known else f"{type(error).__name__}: {line}"


def _loss(error: Exception) -> str:
    """How another process was missed, without what the network library says around it."""
    from moestro.train.team import SILENCE

    match = None if isinstance(error, LostProcess) else SILENCE.search(str(error))
    return match[0].lower() if match else _line(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
