"""What an expert is: a conditional density of the target, fitted to softly assigned rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from moestro.mixtures.gates.base import Effort, Params
from moestro.mixtures.numerics import Array, predictions
from moestro.mixtures.rows import Rows, Scaling, with_intercept


class Expert(BaseEstimator, ABC):
    """A kind of expert with its options; the numbers of all experts travel beside it as a dict of stacked arrays.

    `target` says what it can explain: "real" numbers (standardised before the fit), "count", "positive"
    or "class". Every parameter array has the experts first. Targets and means are `[rows, outputs]` and
    `[rows, experts, outputs]`; a class is a row of zeros with a one.
    """

    target = "real"
    deviance = 0  # power of the Tweedie deviance that goes with the density
    multi_output = False
    smooth = True  # the density has derivatives everywhere
    climbs = True  # EM never lowers the objective
    parametric = True  # finitely many free numbers: `free`, `restore` and `gradient` answer

    def design(self, x: Array) -> Array:
        """Expert features `[rows, p]` of standardised inputs."""
        return with_intercept(x)

    def covariates(self, x: Array) -> Array:
        """Columns of the user's inputs that gate and experts may learn from: all but those with a meaning fixed
        beforehand."""
        return x

    def regressors(self, x: Array, scaling: Scaling) -> Array:
        """Expert features `[rows, p]` of inputs in the user's units, fixed columns included."""
        return self.design(scaling.x(self.covariates(x)))

    @abstractmethod
    def m_step(self, rows: Rows, mass: Array, params: Params | None, effort: Effort) -> Params:
        """Parameters at least as likely for the mass `[rows, experts]` as the present ones (None at the start)."""

    @abstractmethod
    def log_prob(self, params: Params, z: Array, y: Array) -> Array:
        """`log f_i(y | x)`. Shapes: `[rows, experts]`."""

    def expected_log_prob(self, params: Params, z: Array, y: Array) -> Array:
        """What EM climbs with: the mean of `log_prob` under the expert's posterior, or itself for a point."""
        return self.log_prob(params, z, y)

    @abstractmethod
    def mean(self, params: Params, z: Array) -> Array:
        """Expected targets `[rows, experts, outputs]`."""

    @abstractmethod
    def variance(self, params: Params, z: Array) -> Array:
        """Variances of each output `[rows, experts, outputs]`; infinite where the family has none."""

    @abstractmethod
    def cdf(self, params: Params, z: Array, y: Array) -> Array:
        """`P(Y <= y | x)` of each output. Shapes: y `[rows, outputs]` -> `[rows, experts, outputs]`."""

    @abstractmethod
    def sample(self, params: Params, z: Array, label: Array, rng: np.random.RandomState) -> Array:
        """One target `[rows, outputs]` from the expert of each row's label."""

    def penalty(self, params: Params, rows: Rows) -> float:
        """What the monitored objective loses to the experts' prior."""
        return 0.0

    @abstractmethod
    def count(self, params: Params) -> int | None:
        """Free parameters of all experts; None where they do not say."""

    @abstractmethod
    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        """Fitted attributes in the user's units, by name."""

    def free(self, params: Params) -> Array:
        """The parameters as unconstrained numbers."""
        raise self._no_numbers()

    def restore(self, numbers: Array, like: Params) -> Params:
        """Inverse of `free`."""
        raise self._no_numbers()

    def gradient(self, rows: Rows, mass: Array, params: Params) -> Array:
        """Gradient of `sum_t sum_i mass_ti log f_i - penalty` in the free numbers."""
        raise self._no_numbers()

    def _no_numbers(self) -> ValueError:
        assert not self.parametric
        return ValueError(f"{self!r} has no finite set of free numbers; pass another expert or method='bootstrap'")

    def permute(self, params: Params, order: Array) -> Params:
        """The same experts renumbered: new expert j is old expert `order[j]`."""
        return {name: value[order] for name, value in params.items()}


def ridge(rows: Rows, alpha: float) -> Array:
    """Ridge on slopes in the user's units, as a penalty `[p]` on the standardised ones; the intercept is free."""
    return np.concatenate([[0.0], alpha / rows.scaling.x_scale**2])[: rows.z.shape[1]]


def planes(coef: Array, scaling: Scaling) -> dict[str, Any]:
    """Slopes `[experts, outputs, features]` and intercepts in the user's units, of coef `[experts, p, outputs]`."""
    wide = np.zeros((coef.shape[0], coef.shape[2], 1 + len(scaling.x_center)))
    wide[:, :, : coef.shape[1]] = coef.transpose(0, 2, 1)
    intercept, slope = scaling.plane(wide)
    return {
        "expert_coef_": slope * scaling.y_scale,
        "expert_intercept_": scaling.y_center + intercept * scaling.y_scale,
    }


def keep_empty(new: Params, old: Params | None, empty: Array) -> Params:
    """Experts without mass keep their parameters."""
    if old is None or not empty.any():
        return new
    kept = {}
    for name, value in new.items():
        kept[name] = np.where(empty.reshape(-1, *[1] * (value.ndim - 1)), old[name], value)
    return kept


def own_rows(z: Array, coef: Array, label: Array) -> Array:
    """Linear predictor of each row's own expert `[rows, outputs]`."""
    return predictions(z, coef)[np.arange(len(z)), label]
