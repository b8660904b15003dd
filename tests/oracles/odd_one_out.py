"""Processes of which one has something that the others have not, and what all of them say of it."""

from types import SimpleNamespace
from unittest.mock import patch

import torch

from moestro.train import alike
from moestro.train.recipe import load_recipe
from moestro.train.team import Team

THEIRS = {
    "recipe": {"seed": 7},
    "out": {"out": "elsewhere"},
    "torch": {"versions": {"torch": "2.0"}},
    "moestro": {"versions": {"moestro": "0.0"}},
    "code": {"code": "another"},
    "text": {"text": "another"},
}


def compared(rank: int, odd: int) -> dict[str, list[str]]:
    """What this rank is told, by what differs in rank `odd`; "nothing" where all are alike."""
    team, said = Team(rank, torch.distributed.get_world_size()), {}
    for what, theirs in {"nothing": {"versions": {"platform": "another kernel"}}, **THEIRS}.items():
        try:
            _compare(team, theirs if rank == odd else {})
            said[what] = "nothing"
        except ValueError as error:
            said[what] = str(error)
    return said


def _compare(team: Team, mine: dict[str, object]) -> None:
    versions = alike.versions() | mine.get("versions", {})
    code = mine.get("code", alike.code_fingerprint())
    with patch.object(alike, "versions", lambda: versions), patch.object(alike, "code_fingerprint", lambda: code):
        recipe = load_recipe("first", {"seed": mine.get("seed", 0)})
        alike.check_alike(team, recipe, out=mine.get("out", "here"))
    alike.check_same_text(team, SimpleNamespace(fingerprint=mine.get("text", "the same")))
