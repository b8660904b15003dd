"""The training loop and the recipes it reads; torch is imported by the first name that needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moestro.train.recipe import Recipe, RecipeError, dump_recipe, load_recipe, shipped_recipes

if TYPE_CHECKING:
    from moestro.train.build import build_corpus, build_model, cache_folder
    from moestro.train.errors import LostProcess, NonFiniteLoss, Stopped
    from moestro.train.launch import launch_run
    from moestro.train.progress import Progress
    from moestro.train.repro import replay_step
    from moestro.train.run import run_checkpoints, train_run

_HOMES = {
    "build_corpus": "build",
    "build_model": "build",
    "cache_folder": "build",
    "LostProcess": "errors",
    "NonFiniteLoss": "errors",
    "Progress": "progress",
    "Stopped": "errors",
    "launch_run": "launch",
    "replay_step": "repro",
    "run_checkpoints": "run",
    "train_run": "run",
}

__all__ = [
    "LostProcess",
    "NonFiniteLoss",
    "Progress",
    "Recipe",
    "RecipeError",
    "Stopped",
    "build_corpus",
    "build_model",
    "cache_folder",
    "dump_recipe",
    "launch_run",
    "load_recipe",
    "replay_step",
    "run_checkpoints",
    "shipped_recipes",
    "train_run",
]


def __getattr__(name: str) -> Any:
    """Import a name of the loop when it is first used, so that reading a recipe's schema needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moestro.train' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"moestro.train.{_HOMES[name]}"), name)
