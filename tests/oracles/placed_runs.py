"""Whole runs whose experts change their process on the way, on two ranks that are started once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from oracles.tiny_run import tiny_recipe

from moestro.train import Recipe
from moestro.train.progress import Silent
from moestro.train.run import train_models
from moestro.train.team import ALONE, Team

STEPS = 24
ORDER: dict[str, Any] = {}
GREEDY = {"policy": "greedy", "every": 2, "predictor": "last", "gain": 1.0}
REPLICAS = {"policy": "refined", "every": 3, "slots": 12, "gain": 1.0}
OTHERS = {
    "flexmoe": {"policy": "flexmoe", "every": 4, "slots": 10},
    "smartmoe": {"policy": "smartmoe", "every": 4, "gain": 1.0, "predictor": "exponential-average"},
    "anti-correlation": {"policy": "anti-correlation", "every": 8, "gain": 1.0},
}


def placed_recipe(folder: Path, placement: dict[str, Any], **train: Any) -> Recipe:
    """A tiny model of two layers of eight experts, in float64, with the kernel whose rows are independent."""
    settings = {
        "steps": STEPS,
        "evaluate_every": 100,
        "precision": "float64",
        "checkpoint_every": 5,
        "keep_every": 10,
    }
    recipe = tiny_recipe(folder / "text.txt", batch_size=8, **(settings | train)).model_dump()
    recipe["model"] |= {"num_experts": 8, "num_layers": 2, "kernel": "tiled"}
    recipe["parallel"]["placement"] = placement
    return Recipe.model_validate(recipe)


class Said(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def run_all(rank: int, folder: str) -> dict[str, list[str]]:
    """Train without and with re-placements, the latter also from the middle on; what each run said."""
    place, team = Path(folder), Team(rank, 2, rank, 2)
    said = {"order": _run(place, "order", ORDER, team)}
    for name, placement in (("greedy", GREEDY), ("replicas", REPLICAS)):
        said[name] = _run(place, name, placement, team)
        team.by_first(lambda name=name: _cut_short(place / name, place / f"{name}-again"))
        said[f"{name}-again"] = _run(place, f"{name}-again", placement, team, resume=True)
    for name, placement in OTHERS.items():
        said[name] = _run(place, name, placement, team, shard_optimiser=name == "smartmoe")
    return said


def alone_from_the_middle(folder: Path) -> list[str]:
    """What two processes with replicas began, one process ends."""
    _cut_short(folder / "replicas", folder / "alone")
    return _run(folder, "alone", ORDER, ALONE, resume=True)


def _run(
    folder: Path,
    name: str,
    placement: dict[str, Any],
    team: Team,
    resume: bool = False,
    shard_optimiser: bool = False,
) -> list[str]:
    recipe = placed_recipe(folder, placement) if team.first else None
    words = team.by_first(lambda: recipe.model_dump(mode="json") if recipe else None)
    words["parallel"]["shard_optimiser"] = shard_optimiser
    progress = Said()
    train_models(
        Recipe.model_validate(words), folder / name, resume=resume, overwrite=False, progress=progress, team=team
    )
    return progress.lines


def _cut_short(finished: Path, copy: Path) -> None:
    """A copy of a run as it was after step 10, with what it wrote later as if it had not been saved."""
    shutil.copytree(finished, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoint" / "step-00000020")
