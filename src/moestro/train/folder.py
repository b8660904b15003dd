"""The folder of a run: what may be written there, and what a resumed run finds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moestro.train.durable import STAGED, sweep
from moestro.train.files import write_whole
from moestro.train.lock import LOCK
from moestro.train.recipe import Recipe, RecipeError, dump_recipe, load_recipe
from moestro.train.recipe_errors import differing_keys

RECIPE = "recipe.yaml"
RECORDS = ("metrics.jsonl", "evaluations.jsonl", "routing.jsonl", "events.jsonl")
FILES = (RECIPE, *RECORDS, "result.json", "specialisation.json", "report.html")
TOKENIZER = "tokenizer"
FOLDERS = ("model", "checkpoint", "repro", "twin", TOKENIZER)


def check_folder(out: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Whether a run may use this folder; writes nothing.

    Raises ValueError when the folder holds another run and neither `resume` nor `overwrite` is given, when it holds
    files of someone else, when there is nothing to resume, or when the run to resume had another recipe.
    """
    if resume and overwrite:
        raise ValueError("resume continues a run and overwrite replaces it; pass one of them")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; pass a folder for the run")
    found = [name for name in sorted(os.listdir(out)) if not _left_behind(name)] if out.is_dir() else []
    if resume:
        _check_same_recipe(out, recipe)
    elif RECIPE in found and not overwrite:
        raise ValueError(f"{out} holds another run; pass --resume to continue it or --overwrite to replace it")
    elif foreign := [name for name in found if name not in FILES + FOLDERS]:
        raise ValueError(f"{out} holds files that are not a run's, such as {foreign[0]}; pass another folder")
    elif found and not overwrite:
        raise ValueError(f"{out} is not empty (it holds {found[0]}); pass --overwrite or another folder")


def claim_folder(out: Path, recipe: Recipe, *, resume: bool) -> None:
    """Make the folder and put the resolved recipe in it; unless resuming, what a run left there goes first."""
    sweep(out)
    if resume:
        return
    out.mkdir(parents=True, exist_ok=True)
    remove_run(out)
    write_whole(out / RECIPE, dump_recipe(recipe))


def remove_run(out: Path) -> None:
    """Delete what a run writes, and nothing else; the recipe last: half deleted, it is still known as a run."""
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in reversed(FILES):
        (out / name).unlink(missing_ok=True)


def has_run(out: Path) -> bool:
    """Whether a folder holds a run that could be resumed."""
    return (out / RECIPE).is_file()


def _left_behind(name: str) -> bool:
    """What a process that died may leave: its lock, and files that it had not finished."""
    return name == LOCK or name.endswith(STAGED)


def _check_same_recipe(out: Path, recipe: Recipe) -> None:
    if not has_run(out):
        raise ValueError(f"{out} holds no run to resume; leave --resume out to start one")
    try:
        before = load_recipe(out / RECIPE)
    except RecipeError as error:
        raise ValueError(f"the run in {out} cannot be resumed: {error}") from None
    ours, theirs = (each.model_dump(mode="json", exclude={"parallel"}) for each in (recipe, before))
    different = differing_keys(ours, theirs)
    if different:
        keys = ", ".join(different)
        raise ValueError(f"the run in {out} had another recipe: {keys}; use the same values to resume it")
