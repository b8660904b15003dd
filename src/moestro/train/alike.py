"""Whether the processes of a run are about to do the same thing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import xxhash

import moestro
from moestro.data import Corpus
from moestro.train.machine import versions
from moestro.train.recipe import Recipe
from moestro.train.recipe_errors import differing_keys
from moestro.train.team import Team


def check_alike(team: Team, recipe: Recipe, **asked: Any) -> None:
    """Compare recipe, versions and this package's own code over all processes.

    Args:
        team: the processes.
        recipe: of this one.
        asked: what else they must agree on, by name, e.g. the folder of the run.

    Raises:
        ValueError: one differs from the first; names the process, and what it has and the first has not.
    """
    if team.size == 1:
        return
    matters = {name: found for name, found in versions().items() if name != "platform"}  # kernels may differ
    facts = {"recipe": recipe.model_dump(mode="json"), **asked, "versions": matters, "code": code_fingerprint()}
    _compare(team, facts)


def check_same_text(team: Team, corpus: Corpus) -> None:
    """Raise ValueError if a process has another text than the first; names it."""
    _compare(team, {"text": corpus.fingerprint})


@cache
def code_fingerprint() -> str:
    """A checksum of the source of this package as it is on this computer."""
    root, digest = Path(moestro.__file__).parent, xxhash.xxh3_128()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _compare(team: Team, facts: dict[str, Any]) -> None:
    everyones = team.gather(facts)
    for rank, theirs in enumerate(everyones):
        different = differing_keys(theirs, everyones[0])
        if different:
            what = ", ".join(key.removeprefix("recipe.") for key in different)
            raise ValueError(
                f"rank {rank} differs from rank 0: {what}; start all processes with the same recipe, data and code"
            )
