"""A whole study: every training, then the speeds, then the table and the page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.inspect import write_study_page
from moestro.study.circumstances import circumstances
from moestro.study.collect import collect_rows, noise
from moestro.study.display import Display
from moestro.study.plan import Job, Row, plan_jobs, plan_rows, read_json
from moestro.study.pool import Work, run_all
from moestro.study.recipe import DENSE, StudyRecipe, dump_study, file_name, load_study
from moestro.train.errors import Stopped
from moestro.train.files import write_json, write_whole
from moestro.train.interrupt import Interrupt
from moestro.train.recipe_errors import differing_keys

RECIPE = "study.yaml"


def run_study(
    study: StudyRecipe, out: str | Path, *, workers: int = 1, display: Display | None = None
) -> dict[str, Any]:
    """Train every method of a study with every seed and compare them.

    Each training has a process of its own; one that fails is a row that says why. What the folder holds already is
    kept: a study that was stopped or killed goes on where it was. When all have ended, every method is timed beside
    the dense model, one after the other.

    Args:
        study: what to compare.
        out: folder of the study; new, or of the same study.
        workers: trainings at a time; with several, give each one thread (`train.threads: 1`).
        display: is told what happens; None = a table on a terminal, plain lines elsewhere.

    Returns: the content of `study.json`. The page is `out/study.html`.

    Raises:
        ValueError: the study, its text or its folder cannot be used.
        Stopped: a signal stopped it; the same command goes on.
    """
    out, display = Path(out), display or Display()
    if workers < 1:
        raise ValueError(f"workers={workers}; pass at least 1")
    _check_folder(out, study)
    rows = plan_rows(study)
    jobs = plan_jobs(study, rows, out)
    _claim(out, study)
    for row in rows:
        if row.problem:
            display.say(f"{row.label} cannot be built: {row.problem}")
    try:
        with Interrupt() as interrupt:
            trained = _do(_trainings(jobs), workers, interrupt, display, jobs, "training")
            if trained and not _do(_speeds(jobs, out), 1, interrupt, display, jobs, "speed"):
                trained = False
    finally:
        result = write_results(study, rows, jobs, out)
        _page(out, display)
    if not trained:
        raise Stopped("stopped; the same command goes on from here", 0, interrupt.signal_number or 2)
    return result


def write_results(study: StudyRecipe, rows: Sequence[Row], jobs: Sequence[Job], out: Path) -> dict[str, Any]:
    """Write `study.json` from what the runs have left so far."""
    speeds = {row.label: found for row in rows if (found := read_json(_speed_file(out, row))) is not None}
    table = collect_rows(rows, jobs, speeds)
    settled = [job for job in jobs if job.settled]
    result = {
        "format": 1,
        "name": out.resolve().name,
        **circumstances([job.result for job in settled if job.result]),
        "seeds": list(study.seeds),
        "tokens": study.train.steps * study.train.batch_size * study.data.sequence_length,
        "trainings": len(jobs),
        "settled": len(settled),
        "recipe": dump_study(study),
        "noise": noise(table),
        "rows": table,
    }
    write_json(out / "study.json", result)
    return result


def _page(out: Path, display: Display) -> None:
    """Write the page; the numbers are there also where its optional library is missing."""
    try:
        write_study_page(out / "study.json")
    except ModuleNotFoundError as error:
        display.say(f"no page yet: {error}")


def _do(
    work: list[Work], workers: int, interrupt: Interrupt, display: Display, jobs: Sequence[Job], task: str
) -> bool:
    """Do the work under the eyes of the display; False if a signal stopped it."""
    by_name = {job.name: job for job in jobs}
    done = len(jobs) - len(work) if task == "training" else 0

    def ended(name: str, seconds: float) -> None:
        display.ended(name, seconds, _outcome(by_name.get(name)))

    display.begin(task, done, done + len(work), workers)
    try:
        return run_all(work, workers, interrupt, display.started, ended)
    finally:
        display.end()


def _outcome(job: Job | None) -> str:
    if job is None:
        return "measured"
    if job.result is not None:
        return f"{job.result['validation_bits_per_byte']:.4f} bits per byte"
    return f"FAILED: {job.problem}" if job.problem else "stopped"


def _trainings(jobs: Sequence[Job]) -> list[Work]:
    return [_work("train", job, job.folder, job.failure, job.log, job.name) for job in jobs if not job.settled]


def _speeds(jobs: Sequence[Job], out: Path) -> list[Work]:
    """One measurement per method that trained, with its first seed."""
    dense = next(job for job in jobs if job.row.label == DENSE)
    first = {job.row.label: job for job in reversed(jobs) if job.result and job.row.label != DENSE}
    work = []
    for label, job in first.items():
        file = _speed_file(out, job.row)
        if not file.exists():
            failure, log = file.with_suffix(".failed.json"), file.with_suffix(".log")
            extra = {"dense": dense.recipe.model_dump(mode="json")}
            work.append(_work("speed", job, file, failure, log, f"speed of {label}", extra))
    return work


def _work(
    task: str, job: Job, out: Path, failure: Path, log: Path, name: str, more: Mapping[str, Any] | None = None
) -> Work:
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = job.recipe.model_dump(mode="json")
    content = {"task": task, "recipe": recipe, "out": str(out), "failure": str(failure), **(more or {})}
    return Work(name, log.with_suffix(".job.json"), content, log, job.recipe.train.threads)


def _speed_file(out: Path, row: Row) -> Path:
    return out / "speed" / f"{file_name(row.label)}.json"


def _check_folder(out: Path, study: StudyRecipe) -> None:
    """Refuse a folder of something else or of another study."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; pass a folder for the study")
    found = sorted(os.listdir(out)) if out.is_dir() else []
    if RECIPE not in found:
        if found:
            raise ValueError(f"{out} is not empty (it holds {found[0]}) and holds no study; pass another folder")
        return
    different = differing_keys(study.model_dump(mode="json"), load_study(out / RECIPE).model_dump(mode="json"))
    if different:
        keys = ", ".join(different)
        raise ValueError(f"{out} holds another study: {keys}; pass another folder, or the same values to go on")


def _claim(out: Path, study: StudyRecipe) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if not (out / RECIPE).exists():
        write_whole(out / RECIPE, dump_study(study))
