"""Many methods trained under equal conditions and compared; torch is imported by the first name that needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moestro.study.recipe import StudyRecipe, load_study

if TYPE_CHECKING:
    from moestro.study.run import run_study

__all__ = ["StudyRecipe", "load_study", "run_study"]


def __getattr__(name: str) -> Any:
    """Import what trains when it is first used, so that reading a recipe needs no torch."""
    if name != "run_study":
        raise AttributeError(f"module 'moestro.study' has no attribute {name!r}")
    from moestro.study.run import run_study

    return run_study
