"""What fitted scikit-learn estimators answer, in one form."""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.mixtures.numerics import Array, softmax_rows


def class_probabilities(fitted: Any, x: Array, num_classes: int) -> Array:
    """Probabilities `[rows, classes]` of classes 0, 1 ...; 0 for a class that the estimator never saw.

    An estimator without `predict_proba` gives the softmax of its decision function, of `(-s, s)` for two classes.
    """
    if hasattr(fitted, "predict_proba"):
        proba = fitted.predict_proba(x)
    else:
        score = np.asarray(fitted.decision_function(x), dtype=np.float64)
        proba = softmax_rows(np.column_stack([-score, score]) if score.ndim == 1 else score)[1]
    found = np.zeros((len(x), num_classes))
    found[:, np.asarray(fitted.classes_, dtype=np.int64)] = proba
    return found


def num_numbers(fitted: Any) -> int | None:
    """How many numbers an estimator has learned, None where it does not say."""
    if hasattr(fitted, "n_parameters_"):
        return int(fitted.n_parameters_)
    learned = [getattr(fitted, name, None) for name in ("coef_", "dual_coef_", "intercept_")]
    if hasattr(fitted, "dual_coef_"):  # coef_ of a linear kernel repeats the dual coefficients
        learned[0] = None
    sizes = [value.nnz if hasattr(value, "nnz") else np.size(value) for value in learned if value is not None]
    return sum(int(size) for size in sizes) if sizes else None
