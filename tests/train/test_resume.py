"""Whatever a run is made of: three steps, a checkpoint, another process and three steps are six steps exactly."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import resumable
from oracles.resumable import Case, all_cases, build_model, first_lives, parts_of

from moestro.balance import Controller, Loss
from moestro.routers import Router, Scorer, gates, noises
from moestro.routers.capacities import Capacity
from moestro.routers.selects import Select
from moestro.train.objectives import OBJECTIVES, objective_for
from moestro.train.recipe import TrainSection
from moestro.train.schedule import _SHAPES

PARTS = 4


def in_another_process(folder: Path, begin: int, end: int) -> dict[str, dict[str, str]]:
    tests = Path(resumable.__file__).parents[1]
    path = os.pathsep.join([str(tests), *sys.path])
    command = [sys.executable, "-W", "error", resumable.__file__, str(folder), str(begin), str(end)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, timeout=240)
    endings: dict[str, dict[str, str]] = json.loads((folder / "endings.json").read_text())
    return endings


@pytest.mark.parametrize("part", range(PARTS))
def test_two_lives_end_as_one(tmp_path, part):
    cases = all_cases()
    begin, end = (len(cases) * n // PARTS for n in (part, part + 1))
    whole = first_lives(cases[begin:end], tmp_path)
    resumed = in_another_process(tmp_path, begin, end)
    assert whole.keys() == resumed.keys() == {case.name for case in cases[begin:end]}
    different = {
        name: [key for key, value in ending.items() if resumed[name].get(key) != value]
        for name, ending in whole.items()
        if resumed[name] != ending
    }
    assert different == {}


def test_every_part_that_the_library_has_is_in_some_case():
    seen: set[type] = set()
    objectives = set()
    for case in all_cases():
        model = build_model(case)
        seen |= set(parts_of(model))
        objectives.add(type(objective_for(model)))

    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    known = {kind for base in (Loss, Controller, Capacity, Router, Select, Scorer) for kind in below(base)}
    for module in (noises, gates):
        known |= {
            kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module.__name__
        }
    rooms = tuple(
        f"moestro.{room}." for room in ("routers", "balance", "layers", "methods")
    )  # not of foreign models
    ours = {kind for kind in known if kind.__module__.startswith(rooms) and not inspect.isabstract(kind)}
    used_below = {base for kind in seen for base in kind.__mro__}
    assert {kind.__name__ for kind in ours - used_below} == {"LoadMemory"}  # resumed in test_placing.py
    assert objectives == set(OBJECTIVES.values())


def test_every_setting_of_a_step_is_in_some_case():
    cases, fields = all_cases(), TrainSection.model_fields
    assert {case.schedule for case in cases} == set(_SHAPES)
    for name, left_out in (("statistics", set()), ("layers", {"mean"}), ("precision", {"auto"})):
        words = set(fields[name].annotation.__args__) - left_out  # mean is a sum times a number
        default = "float32" if name == "precision" else fields[name].default
        assert {case.step.get(name, default) for case in cases} == words


def test_names_are_distinct():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)


def test_what_is_not_saved_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "restore", lambda *_: None)
    cases = [Case("deepseek-v3")]
    whole = first_lives(cases, tmp_path)["deepseek-v3"]
    forgotten = resumable.second_lives(cases, tmp_path)["deepseek-v3"]
    different = {key.split(".")[0] for key in whole if whole[key] != forgotten[key]}
    assert different >= {"model", "optimiser", "loss 3"}
