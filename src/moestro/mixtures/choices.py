"""Turning what a user asked for, a name or an object, into a gate or an expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sklearn.base import BaseEstimator, clone, is_classifier

from moestro.mixtures.experts import EstimatorClassExpert, EstimatorExpert, Expert
from moestro.mixtures.gates import Gate


def part(choice: Any, table: Mapping[str, Callable[[], Any]], word: str) -> Any:
    """A gate or expert by name, or a copy of the given object."""
    if isinstance(choice, str):
        if choice not in table:
            raise ValueError(f"{word}={choice!r} is unknown; pass one of {', '.join(sorted(table))} or an object")
        return table[choice]()
    if not isinstance(choice, Gate | Expert):
        raise ValueError(f"{word}={choice!r} is no {word}; pass one of {', '.join(sorted(table))} or an object")
    return clone(choice)


def wrapped(expert: Any) -> Any:
    """An estimator of scikit-learn as an expert; anything else as it is."""
    if isinstance(expert, BaseEstimator) and not isinstance(expert, Gate | Expert) and hasattr(expert, "predict"):
        return EstimatorClassExpert(expert) if is_classifier(expert) else EstimatorExpert(expert)
    return expert
