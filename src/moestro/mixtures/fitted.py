"""What a fitted mixture answers: densities, criteria, and its parameters with their errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from moestro.mixtures import errors
from moestro.mixtures.choices import part
from moestro.mixtures.experts import Expert
from moestro.mixtures.gates import GATES, Gate, SoftmaxGate
from moestro.mixtures.mixture import Mixture
from moestro.mixtures.numerics import Array, softmax_rows
from moestro.mixtures.rows import Rows, Scaling, Sides


def _generative(estimator: Any) -> bool:
    return part(estimator.gate, GATES, "gate").generative


class FittedMixture(BaseEstimator):
    """The questions that need a fitted `mixture_` and nothing of how it was found."""

    gate: Any
    expert: Any
    reg_covar: float
    random_state: Any
    mixture_: Mixture
    scaling_: Scaling
    _sides: Sides  # scaling_, and its parts for gate and experts
    n_parameters_: int | None
    _fitted_shape: tuple[int, int, int]  # experts, outputs, features

    def _known(self, y: Any) -> Array:
        """Targets of a fitted estimator's methods as a matrix."""
        raise NotImplementedError

    def _refit(self, rows: Rows) -> Mixture:
        """The mixture that other rows lead to from here."""
        raise NotImplementedError

    def _rows(self, gate: Gate, expert: Expert, sides: Sides, x: Array, y: Array, weight: Array) -> Rows:
        real = expert.target == "real"
        return Rows(
            gate.design(expert.covariates(x), sides.gate),
            expert.regressors(x, sides.expert),
            sides.whole.y(y) if real else y,
            weight,
            sides.expert,
            max(self.reg_covar, 1e-300),
        )

    def _describe(self) -> None:
        """Parameters in the user's units as attributes."""
        for params in (
            self.mixture_.gate.attributes(self.mixture_.gate_params, self._sides.gate),
            self.mixture_.expert.attributes(self.mixture_.expert_params, self._sides.expert),
        ):
            for name, value in params.items():
                setattr(self, name, value)

    def _log_volume(self) -> float:
        """What the standardised log-density of a row is too large by."""
        return self.scaling_.log_volume() + self.mixture_.gate.log_volume(self._sides.gate)

    def _features(self, X: Any) -> tuple[Array, Array]:
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        gate, expert = self.mixture_.gate, self.mixture_.expert
        return gate.design(expert.covariates(x), self._sides.gate), expert.regressors(x, self._sides.expert)

    def _joint(self, X: Any, y: Any) -> tuple[Array, Array]:
        """Joint log-densities of expert and target (and input) in the user's units, and the gate features."""
        u, z = self._features(X)
        target = self._known(y)
        if len(target) != len(u):
            raise ValueError(f"X has {len(u)} rows but y has {len(target)}; pass one target per row")
        if self.mixture_.expert.target == "real":
            target = self.scaling_.y(target)
        return self.mixture_.joint(u, z, target) - self._log_volume(), u

    def gate_proba(self, X: Any) -> Array:
        """Probability of each expert before the target is seen, `[rows, experts]` (the leaves of a tree)."""
        return self.mixture_.share(self._features(X)[0])

    def node_proba(self, X: Any) -> list[Array]:
        """Probabilities of every node's children, one array `[rows, nodes, children]` per level."""
        gate = self.mixture_.gate
        if not isinstance(gate, SoftmaxGate):
            raise ValueError(f"gate={self.gate!r} has no tree; node_proba needs a softmax gate")
        return [np.exp(level) for level in gate.node_log_proba(self.mixture_.gate_params, self._features(X)[0])]

    def responsibilities(self, X: Any, y: Any) -> Array:
        """Posterior probability of each expert given input and target, `[rows, experts]`."""
        return softmax_rows(self._joint(X, y)[0])[1]

    def assign(self, X: Any, y: Any = None) -> Array:
        """Most probable expert of each row, by the posterior, or by the gate when y is left out."""
        return (self.gate_proba(X) if y is None else self.responsibilities(X, y)).argmax(1)

    def log_prob(self, X: Any, y: Any) -> Array:
        """`log p(y | x)` of each row, `[rows]`."""
        joint, u = self._joint(X, y)
        value = softmax_rows(joint)[0]
        if not self.mixture_.gate.generative:
            return value
        return value - self._log_prob_inputs(u)

    def predict_density(self, X: Any, y: Any) -> Array:
        """`p(y | x)` of each row, `[rows]`."""
        return np.exp(self.log_prob(X, y))

    def _log_prob_inputs(self, u: Array) -> Array:
        weight = self.mixture_.gate.log_weight(self.mixture_.gate_params, u)
        return softmax_rows(weight)[0] - self.mixture_.gate.log_volume(self._sides.gate)

    @available_if(_generative)
    def score_samples(self, X: Any) -> Array:
        """`log p(x)` of each row under a gate that models the inputs, `[rows]`: low for unusual inputs."""
        return self._log_prob_inputs(self._features(X)[0])

    @available_if(_generative)
    def joint_log_prob(self, X: Any, y: Any) -> Array:
        """`log p(x, y)` of each row under a gate that models the inputs, `[rows]`."""
        return softmax_rows(self._joint(X, y)[0])[0]

    # -------------------------------------------------------------- criteria

    def log_likelihood(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Weighted sum of `log p(y | x)`; of `log p(x, y)` under a gate that models the inputs."""
        joint, u = self._joint(X, y)
        weight = _check_sample_weight(sample_weight, u, dtype=np.float64)
        return float(weight @ softmax_rows(joint)[0])

    def aic(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Akaike's criterion `-2 LL + 2 ν`; smaller is better."""
        return -2 * self.log_likelihood(X, y, sample_weight) + 2 * self._counted()

    def bic(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Bayesian criterion `-2 LL + ν log n`, n the sum of weights; smaller is better."""
        joint, u = self._joint(X, y)
        weight = _check_sample_weight(sample_weight, u, dtype=np.float64)
        return -2 * float(weight @ softmax_rows(joint)[0]) + self._counted() * float(np.log(weight.sum()))

    def _counted(self) -> int:
        if self.n_parameters_ is None:
            raise ValueError(
                f"expert={self.expert!r} does not say how many numbers it learned; compare fits by held-out "
                "log_prob, as select_n_experts(criterion='cv') does"
            )
        return int(self.n_parameters_)

    def icl(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Integrated completed likelihood `BIC - 2 sum_t w_t log max_i h_ti`; smaller is better."""
        joint, u = self._joint(X, y)
        weight = _check_sample_weight(sample_weight, u, dtype=np.float64)
        top = np.log(softmax_rows(joint)[1].max(1))
        return self.bic(X, y, sample_weight) - 2 * float(weight @ top)

    # ------------------------------------------------------------ parameters

    def standard_errors(
        self, X: Any, y: Any, sample_weight: Any = None, *, method: str = "oim", n_resamples: int = 100
    ) -> dict[str, Array]:
        """Standard errors of the fitted attributes, by name, on the given rows.

        "oim" inverts the observed information. "bootstrap" refits resampled rows from the fitted shares and spreads
        the results, experts matched by Hungarian assignment of their shares; it serves kinked densities too.

        The information is that of the (penalised) log-likelihood, so that the uncertainty about who explains
        what is counted. Infinite where the likelihood is flat. Trees answer for their experts only.
        """
        if method not in ("oim", "bootstrap"):
            raise ValueError(f"method={method!r} is unknown; pass oim or bootstrap")
        rows = self._rows_of(X, y, sample_weight)
        if method == "oim":
            return errors.attribute_errors(self.mixture_, rows, self._sides)
        rng = check_random_state(self.random_state)
        return errors.bootstrap_errors(self.mixture_, rows, self._sides, self._refit, n_resamples, rng)

    def summary(self, X: Any = None, y: Any = None, sample_weight: Any = None) -> str:
        """A table of the parameters; with X and y also of standard errors, AIC, BIC and ICL."""
        check_is_fitted(self)
        num, lines = self._fitted_shape[0], []
        lines.append(f"{type(self).__name__}: {num} experts, {self.n_parameters_ or 'uncounted'} parameters")
        state = "converged" if self.converged_ else "not converged"
        lines.append(f"log-likelihood {self.loglik_:.6f} after {self.n_iter_} iterations, {state}")
        lines.append("weights " + " ".join(f"{weight:.4f}" for weight in self.weights_))
        found = None
        if X is not None:
            found = self.standard_errors(X, y, sample_weight)
            criteria = {name: getattr(self, name)(X, y, sample_weight) for name in ("aic", "bic", "icl")}
            lines.append(" ".join(f"{name.upper()} {value:.3f}" for name, value in criteria.items()))
        estimates = errors.attributes(self.mixture_, self._sides)
        return "\n".join([*lines, errors.table(estimates, found)])

    def _rows_of(self, X: Any, y: Any, sample_weight: Any) -> Rows:
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        return self._rows(self.mixture_.gate, self.mixture_.expert, self._sides, x, self._known(y), weight)

    def sort_experts(self, by: str | Callable[[Any], Any] = "weight") -> Self:
        """A copy with the experts of a flat mixture renumbered; predictions stay the same.

        Args:
            by: "weight" (largest first), "intercept", "variance", "coef:k" (smallest first), or a function of the
                estimator that returns one number per expert (smallest first).
        """
        check_is_fitted(self)
        return self._renumbered(np.argsort(self._sort_key(by), kind="stable"))

    def _sort_key(self, by: str | Callable[[Any], Any]) -> Array:
        if callable(by):
            return np.asarray(by(self))
        if by == "weight":
            return -self.weights_
        if by == "intercept":
            return self.expert_intercept_[:, 0]
        if by == "variance" and hasattr(self, "expert_variance_"):
            return self.expert_variance_[:, 0]
        if by.startswith("coef:"):
            return self.expert_coef_[:, 0, int(by[5:])]
        raise ValueError(f"by={by!r} is no order; pass weight, intercept, variance, coef:k or a function")

    def _renumbered(self, order: Array) -> Self:
        other = copy.copy(self)
        other.mixture_ = self.mixture_.permute(order)
        other.weights_ = self.weights_[order]
        other._describe()
        return other
