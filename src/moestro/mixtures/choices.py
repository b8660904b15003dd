"""Turning what a user asked for, a name or an object, into a gate or an expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone, is_classifier

from moestro.mixtures.experts import EstimatorClassExpert, EstimatorExpert, Expert
from moestro.mixtures.gates import Gate
from moestro.mixtures.numerics import Array


def part(choice: Any, table: Mapping[str, Callable[[], Any]], word: str) -> Any:
    """A gate or expert by name, or a copy of the given object."""
    if isinstance(choice, str):
        if choice not in table:
            raise ValueError(f"{word}={choice!r} is unknown; pass one of {', '.join(sorted(table))} or an object")
        return table[choice]()
    if not isinstance(choice, Gate | Expert):
        raise ValueError(f"{word}={choice!r} is no {word}; pass one of {', '.join(sorted(table))} or an object")
    return clone(choice)


def feature_columns(choice: Any, places: Array, names: Array | None, word: str) -> tuple[int, ...] | None:
    """Columns among the covariates that a gate or the experts are to read.

    Args:
        choice: numbers of columns of X, or names of its columns; None means all.
        places: column of X of each covariate.
        names: names of the columns of X, where it had any.
        word: "gate" or "expert", for messages.
    """
    if choice is None:
        return None
    asked = [choice] if isinstance(choice, str | Integral) else list(choice)
    known = {} if names is None else {str(name): k for k, name in enumerate(names)}
    found = []
    for one in asked:
        column = known.get(one) if isinstance(one, str) else one
        if isinstance(column, bool | np.bool_) or not isinstance(column, Integral) or column not in places:
            columns = ", ".join(str(k if names is None else names[k]) for k in places)
            raise ValueError(f"{word}_features={choice!r}: {one!r} is no feature to read; pass some of {columns}")
        found.append(int(np.flatnonzero(places == column)[0]))
    if len(set(found)) < len(found) or (word == "gate" and not found):
        raise ValueError(
            f"{word}_features={choice!r} must name each feature once and the gate's at least one; for a gate that "
            "reads nothing pass gate='constant'"
        )
    return tuple(found)


def wrapped(expert: Any) -> Any:
    """An estimator of scikit-learn as an expert; anything else as it is."""
    if isinstance(expert, BaseEstimator) and not isinstance(expert, Gate | Expert) and hasattr(expert, "predict"):
        return EstimatorClassExpert(expert) if is_classifier(expert) else EstimatorExpert(expert)
    return expert
