"""How many experts, and which expert is which."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.base import clone
from sklearn.model_selection import check_cv
from sklearn.utils.metaestimators import _safe_split

from moestro.mixtures.base import MixtureOfExperts
from moestro.mixtures.numerics import Array

CRITERIA = ("bic", "aic", "icl", "cv")


def select_n_experts(
    estimator: MixtureOfExperts,
    X: Any,
    y: Any,
    candidates: Iterable[int] = range(1, 7),
    criterion: str = "bic",
    sample_weight: Any = None,
    cv: int = 5,
) -> tuple[MixtureOfExperts, list[dict[str, Any]]]:
    """Fit a mixture for every number of experts and return the best, and a table of all.

    Criteria compare densities of the same thing: never compare a Gaussian gate (inputs and targets) with another.

    Args:
        estimator: options of the mixtures; its `n_init` and `n_jobs` apply.
        candidates: numbers of experts.
        criterion: "bic", "aic", "icl" (smaller is better) or "cv", minus the mean held-out `log_prob` per row.
        sample_weight: how often each row counts; not with "cv".
        cv: folds of "cv".

    Returns:
        The fitted estimator with the smallest criterion, and one dict per candidate with n_experts, loglik,
        n_parameters, aic, bic, icl, (cv), n_iter, converged and on_floor: whether an expert's variance ended at its
        floor, which makes every criterion worthless; such a fit is only chosen when all are like that.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r} is unknown; pass one of {', '.join(CRITERIA)}")
    if criterion == "cv" and sample_weight is not None:
        raise ValueError("criterion='cv' does not take sample_weight; leave one of them out")
    fits, table = [], []
    for number in candidates:
        fitted = clone(estimator).set_params(n_experts=number).fit(X, y, sample_weight=sample_weight)
        row = {"n_experts": number, "loglik": fitted.loglik_, "n_parameters": fitted.n_parameters_}
        if fitted.n_parameters_ is not None or criterion != "cv":
            row |= {name: getattr(fitted, name)(X, y, sample_weight) for name in ("aic", "bic", "icl")}
        if criterion == "cv":
            row["cv"] = -_held_out(clone(estimator).set_params(n_experts=number), X, y, cv)
        row |= {"n_iter": fitted.n_iter_, "converged": fitted.converged_, "on_floor": _on_floor(fitted)}
        fits.append(fitted)
        table.append(row)
    best = min(range(len(table)), key=lambda k: (table[k]["on_floor"], table[k][criterion]))
    return fits[best], table


def _held_out(estimator: MixtureOfExperts, X: Any, y: Any, cv: int) -> float:
    """Mean `log_prob` of rows that the fit did not see."""
    total, count = 0.0, 0
    for train, test in check_cv(
        cv, y, classifier=estimator.__sklearn_tags__().estimator_type == "classifier"
    ).split(X, y):
        fitted = clone(estimator).fit(*_safe_split(estimator, X, y, train))
        total += float(fitted.log_prob(*_safe_split(estimator, X, y, test)).sum())
        count += len(test)
    return total / count


def _on_floor(fitted: MixtureOfExperts) -> bool:
    if not hasattr(fitted, "expert_covariance_"):
        return False
    smallest = np.linalg.eigvalsh(fitted.expert_covariance_).min()
    return bool(smallest <= 1.001 * fitted.get_params()["reg_covar"] * fitted.scaling_.y_scale**2)


def align_experts(estimator: MixtureOfExperts, reference: MixtureOfExperts, X: Any, y: Any) -> MixtureOfExperts:
    """A copy of a flat mixture with its experts in the order of another's: label switching undone.

    Matches by the Hungarian method on shared responsibility, `max sum_t h_ti h'_tj`.
    """
    ours, theirs = estimator.responsibilities(X, y), reference.responsibilities(X, y)
    if ours.shape != theirs.shape:
        raise ValueError(f"The mixtures have {ours.shape[1]} and {theirs.shape[1]} experts; align equal numbers")
    order: Array = linear_sum_assignment(-theirs.T @ ours)[1]
    return estimator._renumbered(order)
