"""The checkpoints of a run: which are kept, and which one a resumed run starts from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.train.checkpoint_files import (
    DamagedCheckpoint,
    read_checkpoint,
    read_numbers,
    verify_checkpoint,
    write_checkpoint,
)
from moestro.train.durable import STAGED, sweep
from moestro.train.state import Checkpoint
from moestro.train.team import ALONE, Team

Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoints:
    """The folder `checkpoint/` of a run, one folder `step-N` for each checkpoint.

    Attributes:
        folder: made when the first checkpoint arrives.
        keep_last: newest ones to keep; two at least let a damaged one be replaced by the one before it.
        keep_best: whether to keep the one after the evaluation with the fewest bits per byte.
        keep_every: keep those at multiples of this step for good; 0 = none.
    """

    folder: Path
    keep_last: int = 2
    keep_best: bool = False
    keep_every: int = 0

    def save(self, checkpoint: Checkpoint, team: Team = ALONE) -> Path:
        """Write a checkpoint, then remove what it makes superfluous.

        A step that is there already, intact, is not written again.

        Args:
            checkpoint: what this process has of it.
            team: the processes that save it together.

        Raises:
            OSError: the disk is full or fails; the checkpoints before are untouched.
        """
        target = self.folder / f"step-{checkpoint.step:08d}"
        if team.by_first(lambda: self._make_way(target)):
            write_checkpoint(target, checkpoint, team)
        team.by_first(self._prune)
        return target

    def _make_way(self, target: Path) -> bool:
        """Whether a checkpoint has yet to be written; if so, nothing is in its place any more."""
        if not self.folder.is_dir():
            self.folder.mkdir()
        if target.exists() and self._intact(target):
            return False
        shutil.rmtree(target, ignore_errors=True)
        return True

    def latest(self, say: Say, team: Team = ALONE) -> Checkpoint | None:
        """The newest checkpoint that is whole; says which damaged ones it passed over. None where there is none.

        Raises:
            ValueError: all are damaged, or the newest was written by a newer version.
        """
        team.by_first(lambda: sweep(self.folder))
        names = team.by_first(lambda: [path.name for path in self.paths()])
        for name in reversed(names):
            try:
                return read_checkpoint(self.folder / name, team)
            except DamagedCheckpoint as error:
                say(f"{error}; falling back to the checkpoint before it")
        if names:
            raise ValueError(
                f"none of the {len(names)} checkpoints in {self.folder} is whole; "
                "start again with --overwrite, or give another folder"
            )
        return None

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != STAGED)

    def kept(self) -> dict[Path, list[str]]:
        """Why each checkpoint is kept: "last", "best", "milestone"; empty = it will go with the next save."""
        paths = self.paths()
        reasons: dict[Path, list[str]] = {path: [] for path in paths}
        for path in paths[-self.keep_last :]:
            reasons[path].append("last")
        scores = {path: score for path in paths if (score := self._score(path)) is not None}
        if self.keep_best and scores:
            reasons[min(scores, key=scores.__getitem__)].append("best")
        for path in paths:
            if self.keep_every and step_of(path) % self.keep_every == 0:
                reasons[path].append("milestone")
        return reasons

    def finish(self) -> None:
        """A finished run keeps its best and its milestones."""
        for path, reasons in self.kept().items():
            if reasons in ([], ["last"]):
                shutil.rmtree(path)
        sweep(self.folder)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _prune(self) -> None:
        for path, reasons in self.kept().items():
            if not reasons:
                shutil.rmtree(path)

    @staticmethod
    def _intact(path: Path) -> bool:
        try:
            verify_checkpoint(path)
        except ValueError:
            return False
        return True

    @staticmethod
    def _score(path: Path) -> float | None:
        try:
            return read_numbers(path)["bits_per_byte"]
        except DamagedCheckpoint:
            return None


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def checkpoint_table(run: Path, checkpoints: dict[str, Checkpoints], *, verify: bool) -> list[dict[str, Any]]:
    """One row per checkpoint of a run: model, step, size, why it is kept, and its state.

    Args:
        run: folder of the run, to shorten paths.
        checkpoints: of each model of the run, by name.
        verify: read every byte and compare; otherwise the state is left out.
    """
    rows = []
    for model, folder in checkpoints.items():
        for path, reasons in folder.kept().items():
            size = sum(file.stat().st_size for file in path.iterdir())
            row: dict[str, Any] = {"model": model, "step": step_of(path), "mebibytes": round(size / 2**20, 1)}
            row |= {"kept_as": ", ".join(reasons) or "-", "path": str(path.relative_to(run))}
            rows.append(row | (_state(path) if verify else {}))
    return rows


def _state(path: Path) -> dict[str, Any]:
    try:
        verified = verify_checkpoint(path)
    except ValueError as error:
        return {"state": str(error), "gib_per_second": None}
    return {"state": "whole", "gib_per_second": round(verified.gib_per_second, 2)}
