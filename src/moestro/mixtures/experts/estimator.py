"""Experts that are scikit-learn estimators: support vector machines and others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.special import ndtr
from sklearn import config_context
from sklearn.base import clone
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.validation import has_fit_parameter

from moestro.mixtures.answers import class_probabilities, num_numbers
from moestro.mixtures.experts.base import Expert, keep_empty
from moestro.mixtures.experts.memory import Answers, Learned
from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.numerics import Array, draw_labels, is_empty
from moestro.mixtures.rows import Rows, Scaling

_NOTHING = 1e-8  # shares below this part of an expert's largest are not worth a row
_EDGE = 1e-6  # a class that an estimator excludes keeps this probability
_MOVED = 0.01  # part of an expert's mass that moves before its estimator is trained anew


@dataclass(frozen=True)
class _Copy:
    """A trained estimator, what it predicts for rows, and the mass for which training was last tried."""

    estimator: Any
    answers: Answers
    learned: Learned


class _Wrapped(Expert):
    """Refits copies of an estimator to weighted rows and keeps a copy only where the likelihood does not fall.

    A copy is trained when a hundredth of its rows has moved since training was last tried.
    """

    parametric = False

    def __init__(self, estimator: Any = None):
        self.estimator = estimator

    @abstractmethod
    def _default(self) -> Any:
        """The estimator when none was given."""

    @abstractmethod
    def _plain(self, y: Array) -> Array:
        """Targets as the estimator wants them."""

    @staticmethod
    @abstractmethod
    def _ask(fitted: Any, num_classes: int, z: Array) -> Array:
        """What an estimator predicts: targets `[rows]`, or probabilities `[rows, classes]`."""

    @abstractmethod
    def _judge(self, fitted: _Copy, rows: Rows, mass: Array) -> tuple[float, dict[str, float]]:
        """Mass-weighted log-likelihood of one expert at its best other numbers, and those numbers."""

    def _fresh(self, number: int) -> Any:
        copy = self._default() if self.estimator is None else clone(self.estimator)
        if copy.get_params(deep=False).get("random_state", number) is None:
            copy.set_params(random_state=number)  # experts differ, and every refit of one is the same
        return copy

    def _check_weights(self) -> None:
        copy = self._fresh(0)
        if not has_fit_parameter(copy, "sample_weight"):
            raise ValueError(
                f"{copy!r} takes no sample_weight in fit, so it cannot be an expert; pass one that does, "
                "or use GatedEnsembleRegressor and GatedEnsembleClassifier"
            )

    def _train(self, number: int, rows: Rows, mass: Array) -> _Copy:
        copy = self._fresh(number)
        used = mass > _NOTHING * mass.max() if mass.max() > 0 else np.ones(len(mass), dtype=bool)
        y, weight = self._plain(rows.y[used]), mass[used] if mass.max() > 0 else rows.weight[used]
        if self.target == "class" and len(np.unique(y)) < 2:
            copy = DummyClassifier()
        with config_context(assume_finite=True):
            copy.fit(rows.z[used, 1:], y, sample_weight=weight)
        return _Copy(copy, Answers(partial(self._ask, copy, rows.y.shape[1])), Learned(rows.z, mass))

    def _refit(self, number: int, old: _Copy | None, rows: Rows, mass: Array) -> tuple[_Copy, dict[str, float]]:
        if old is None:
            self._check_weights()
            first = self._train(number, rows, mass)
            return first, self._judge(first, rows, mass)[1]
        before, numbers = self._judge(old, rows, mass)
        if not old.learned.moved(rows.z, mass, _MOVED):
            return old, numbers
        tried = self._train(number, rows, mass)
        value, better = self._judge(tried, rows, mass)
        return (tried, better) if value >= before else (replace(old, learned=tried.learned), numbers)

    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        num = mass.shape[1]
        old = [None] * num if params is None else params["estimator"]
        both = [self._refit(i, old[i], rows, mass[:, i]) for i in range(num)]
        found = np.empty(num, dtype=object)
        found[:] = [copy for copy, _ in both]
        stacked = {name: np.array([numbers[name] for _, numbers in both]) for name in both[0][1]}
        return keep_empty({"estimator": found, **stacked}, params, is_empty(mass.sum(0), rows.total))

    def count(self, params: Params) -> int | None:
        """Numbers in the estimators' coefficients, and one variance each; None for trees and other shapes."""
        sizes = [num_numbers(each.estimator) for each in params["estimator"]]
        known = [size for size in sizes if size is not None]
        return sum(known) + (len(known) if self.target == "real" else 0) if len(known) == len(sizes) else None


class EstimatorExpert(_Wrapped):
    """Any regressor with `sample_weight` as the mean of normal experts: `f_i(y|x) = N(y; m_i(x), σ_i²)`.

    The M-step refits a copy of the regressor, whatever it minimises, and `σ_i² = sum_t h_ti (y_t - m_i)² / H_i`; a
    refit under which the likelihood would fall is dropped, so EM still climbs. Regressors see standardised inputs
    and targets. A regressor that can interpolate (a deep tree) drives σ² to its floor: regularise it.

    Args:
        estimator: the regressor; None takes `Ridge()`. Without a random_state of its own, expert i gets seed i.

    Parameters: `estimator` `[experts]`, `variance` `[experts]`.
    """

    def _default(self) -> Any:
        return Ridge()

    def _plain(self, y: Array) -> Array:
        return y[:, 0]

    @staticmethod
    def _ask(fitted: Any, num_classes: int, z: Array) -> Array:
        with config_context(assume_finite=True):
            return np.asarray(fitted.predict(z[:, 1:]), dtype=np.float64).reshape(len(z))

    def _judge(self, fitted: _Copy, rows: Rows, mass: Array) -> tuple[float, dict[str, float]]:
        error = mass @ (rows.y[:, 0] - fitted.answers(rows.z)) ** 2
        total = max(float(mass.sum()), 1e-300)
        variance = max(float(error) / total, rows.floor)
        return -0.5 * (total * float(np.log(2 * np.pi * variance)) + float(error) / variance), {
            "variance": variance
        }

    def mean(self, params: Params, z: Array) -> Array:
        return np.stack([each.answers(z) for each in params["estimator"]], axis=1)[:, :, None]

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        variance = params["variance"]
        return -0.5 * ((y - self.mean(params, z)[:, :, 0]) ** 2 / variance + np.log(2 * np.pi * variance))

    def variance(self, params: Params, z: Array) -> Array:
        return np.broadcast_to(params["variance"][:, None], (len(z), len(params["variance"]), 1))

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        return ndtr((y[:, None, :] - self.mean(params, z)) / np.sqrt(self.variance(params, z)))

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        mean = self.mean(params, z)[np.arange(len(z)), label]
        return mean + rng.standard_normal(mean.shape) * np.sqrt(params["variance"][label])[:, None]

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        variance = params["variance"][:, None] * scaling.y_scale**2
        return {
            "expert_estimators_": [each.estimator for each in params["estimator"]],
            "expert_variance_": variance,
        }


class EstimatorClassExpert(_Wrapped):
    """Any classifier with `sample_weight` as expert; its probabilities stay 1e-6 away from 0.

    One without `predict_proba` gives the softmax of its decision function (`σ(2s)` for two classes, the tanh of
    Collobert, Bengio & Bengio 2002). A refit under which the likelihood would fall is dropped, so EM still climbs.

    Args:
        estimator: the classifier; None takes `LogisticRegression()`. Without a random_state, expert i gets seed i.

    Parameters: `estimator` `[experts]`.
    """

    target = "class"

    def _default(self) -> Any:
        return LogisticRegression()

    def _plain(self, y: Array) -> Array:
        return y.argmax(1)

    @staticmethod
    def _ask(fitted: Any, num_classes: int, z: Array) -> Array:
        with config_context(assume_finite=True):
            proba = class_probabilities(fitted, z[:, 1:], num_classes)
        return (1 - _EDGE) * proba + _EDGE / num_classes

    def _judge(self, fitted: _Copy, rows: Rows, mass: Array) -> tuple[float, dict[str, float]]:
        return float(mass @ np.log((rows.y * fitted.answers(rows.z)).sum(1))), {}

    def mean(self, params: Params, z: Array) -> Array:
        return np.stack([each.answers(z) for each in params["estimator"]], axis=1)

    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        return np.log((self.mean(params, z) * y[:, None]).sum(2))

    def variance(self, params: Params, z: Array) -> Array:
        share = self.mean(params, z)
        return share * (1 - share)

    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        raise NotImplementedError("Classes have no order")

    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        share = self.mean(params, z)[np.arange(len(z)), label]
        return np.eye(share.shape[1])[draw_labels(share, rng)]

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        return {"expert_estimators_": [each.estimator for each in params["estimator"]]}
