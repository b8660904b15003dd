"""Mixture of experts for regression."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.metrics import d2_tweedie_score
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data

from moestro.mixtures.base import MixtureOfExperts
from moestro.mixtures.choices import part, wrapped
from moestro.mixtures.experts import REGRESSION_EXPERTS, ConstantExpert, Expert
from moestro.mixtures.gates import ConstantGate
from moestro.mixtures.numerics import Array, draw_labels
from moestro.mixtures.quantiles import mixture_quantile


class MixtureOfExpertsRegressor(RegressorMixin, MixtureOfExperts):
    """Regression by a gate that shares the input space among experts, fitted by maximum likelihood.

        p(y|x) = sum_i g_i(x) f_i(y|x)    Jacobs, Jordan, Nowlan & Hinton 1991; Jordan & Jacobs 1994

    Args:
        n_experts: number of experts of a flat mixture; None means 2, or the leaves of `branching`.
        branching: children per node for every level of a tree of softmax gates: (2, 2, 2) is a binary tree with
            eight experts.
        gate: "softmax", "gaussian", "constant", "exponential-family", "kernel", "reconstruction" or a gate object
            with other options.
        expert: "linear", "ridge", "gaussian" (full covariance), "constant", "laplace", "student", "skew-normal",
            "skew-t", "poisson", "gamma", "bayesian" (a posterior over linear ones), "gp" (Gaussian processes),
            "svm", "elm" (extreme learning machines), an expert object with other options
            (`BinomialExpert(trials=0)`, `PoissonExpert(exposure=0)`), or any regressor of scikit-learn that takes
            sample_weight (see `EstimatorExpert`).
        gate_features: columns of X that the gate reads (flexmix calls them concomitant), by number or by name;
            None means all. The slopes of the others are 0 in `gate_coef_`; gates of densities have parameters of
            the columns that they read alone.
        expert_features: columns that the experts read, in the same words; [] leaves them an intercept.
        algorithm: "em"; "gem" (one Newton step of the gate); "ecm" (shares renewed between gate and experts);
            "mm" (bounds instead of Newton steps); "hard-em"; "stochastic-em"; "annealed-em";
            "gradient" (L-BFGS).
        loss: of algorithm "gradient": "mixture" (the likelihood), or the squared errors of Jacobs et al. 1991,
            "expected" `sum_i g_i |y - μ_i|²` and "blend" `|y - sum_i g_i μ_i|²` (Meta-Pi), for normal experts;
            their paths are minus the loss, their variances those of the errors under the gate.
        stopping: of the EM algorithms: "change" of the mean objective in the last step, or "aitken", what it can
            still gain if its steps go on shrinking as the last two did (the stricter rule for slow fits).
        tol: stop when that is less.
        max_iter: most iterations per start.
        n_init: number of starts; each runs 100 iterations at most and the best goes on.
        init: "segments", "subset", "random", "soft", "kmeans", "auto" (these in turn), or shares `[rows, experts]`
            of a single start.
        reg_covar: smallest variance of an expert, relative to the variance of y: the likelihood of a mixture of
            normals has no maximum without it.
        warm_start: continue from the fitted parameters.
        random_state: seed of the starts.
        verbose: 1 reports every tenth iteration, 2 every one.
        n_jobs: processes for the starts.

    Attributes: `gate_coef_` `[experts, features]`, `gate_intercept_` (last row 0; `node_coef_`, `node_intercept_`
    per level for a tree; `gate_means_`, `gate_covariances_` for Gaussian gates), `weights_` `[experts]` (mean
    gate), `expert_coef_` `[experts, outputs, features]`, `expert_intercept_` `[experts, outputs]` and the scale,
    shape or degrees of freedom of the family (`expert_variance_`, `expert_covariance_`, `expert_scale_`,
    `expert_dof_`, `expert_skew_`, `expert_shape_`), `loglik_`, `loglik_path_`, `lower_bound_`, `n_parameters_`,
    `n_iter_`, `converged_`. Under a Gaussian gate log-likelihoods are those of inputs and targets together.
    """

    _experts = REGRESSION_EXPERTS

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        known = isinstance(self.expert, BaseEstimator) or self.expert in self._experts  # tags never raise
        expert = part(wrapped(self.expert), self._experts, "expert") if known else None
        tags.target_tags.multi_output = expert is not None and expert.multi_output
        vague = self.gate in ("constant", "reconstruction") or isinstance(self.gate, ConstantGate)
        tags.regressor_tags.poor_score = vague and isinstance(expert, ConstantExpert)  # steps, hardly placed by x
        tags.target_tags.positive_only = expert is not None and expert.target in ("count", "positive")
        return tags

    def _validate(self, X: Any, y: Any) -> tuple[Array, Any]:
        several = self._chosen_expert().multi_output
        x, y = validate_data(self, X, y, dtype=np.float64, multi_output=several, y_numeric=True)
        return x, y if several else column_or_1d(y, warn=True)

    def _encode(self, y: Any) -> Array:
        self._flat = y.ndim == 1
        self.n_outputs_ = 1 if self._flat else y.shape[1]
        return np.asarray(y, dtype=np.float64).reshape(len(y), -1)

    def _known(self, y: Any) -> Array:
        target = check_array(y, dtype=np.float64, ensure_2d=False, input_name="y")
        target = target.reshape(len(target), -1)
        if target.shape[1] != self.n_outputs_:
            raise ValueError(f"y has {target.shape[1]} outputs but the mixture was fitted with {self.n_outputs_}")
        self._check_target(target, self.mixture_.expert)
        return target

    def _check_target(self, y: Array, expert: Expert) -> None:
        if expert.target == "count" and y.min() < 0:
            raise ValueError(
                f"y has the value {y.min():g} but {type(expert).__name__} explains counts of 0 and more"
            )
        if expert.target == "positive" and y.min() <= 0:
            raise ValueError(f"y has the value {y.min():g} but gamma experts explain targets above 0")

    def _units(self, value: Array) -> Array:
        """Targets in the user's units and in the user's form."""
        value = value * self.scaling_.y_scale + self.scaling_.y_center
        return value[..., 0] if self._flat else value

    def predict(self, X: Any, return_std: bool = False) -> Array | tuple[Array, Array]:
        """Mean `sum_i g_i(x) μ_i(x)`, and the standard deviation by the law of total variance.

        Shapes: `[rows]` or `[rows, outputs]`, as y was given.
        """
        u, z = self._features(X)
        share = self.mixture_.share(u)[:, :, None]
        mean = self.mixture_.expert.mean(self.mixture_.expert_params, z)
        center = (share * mean).sum(1)
        if not return_std:
            return self._units(center)
        variance = self.mixture_.expert.variance(self.mixture_.expert_params, z)
        with np.errstate(invalid="ignore"):
            spread = np.where(share > 0, share * (variance + (mean - center[:, None]) ** 2), 0.0).sum(1)
        std = np.sqrt(spread) * self.scaling_.y_scale
        return self._units(center), std[:, 0] if self._flat else std

    def d2_score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Part of the deviance that `predict` explains, 1 at best and 0 for the mean of y.

            1 - deviance(y, predict(X)) / deviance(y, mean of y)

        The deviance is that of the experts' family: Poisson for counts, gamma for positive targets, squared error
        (where the answer is R²) for all others; see `sklearn.metrics.d2_tweedie_score`.
        """
        check_is_fitted(self)
        power = self.mixture_.expert.deviance
        return float(d2_tweedie_score(y, self.predict(X), sample_weight=sample_weight, power=power))

    def predict_experts(self, X: Any) -> Array:
        """Mean of every expert, `[rows, experts, outputs]`."""
        z = self._features(X)[1]
        mean = self.mixture_.expert.mean(self.mixture_.expert_params, z)
        return mean * self.scaling_.y_scale + self.scaling_.y_center

    def predict_hard(self, X: Any) -> Array:
        """Mean of the expert that the gate prefers. Shapes as `predict`."""
        u, z = self._features(X)
        mean = self.mixture_.expert.mean(self.mixture_.expert_params, z)
        return self._units(mean[np.arange(len(u)), self.mixture_.share(u).argmax(1)])

    def predict_quantiles(self, X: Any, quantiles: Any = (0.05, 0.5, 0.95)) -> Array:
        """Quantiles of `p(y | x)`, of each output alone.

        Shapes: `[rows, quantiles]` or `[rows, quantiles, outputs]`.
        """
        levels = np.atleast_1d(np.asarray(quantiles, dtype=np.float64))
        if levels.min() <= 0 or levels.max() >= 1:
            raise ValueError(f"quantiles={quantiles} must lie strictly between 0 and 1")
        u, z = self._features(X)
        found = [mixture_quantile(self.mixture_, u, z, level) for level in levels]
        return self._units(np.stack(found, axis=1))

    def predict_interval(self, X: Any, coverage: float = 0.9) -> tuple[Array, Array]:
        """Central interval that holds y with the given probability. Shapes as `predict`, twice."""
        if not 0 < coverage < 1:
            raise ValueError(f"coverage={coverage} must lie strictly between 0 and 1")
        both = self.predict_quantiles(X, (0.5 - coverage / 2, 0.5 + coverage / 2))
        return both[:, 0], both[:, 1]

    def sample(self, X: Any, random_state: Any = None) -> Array:
        """One draw from `p(y | x)` for each row: an expert by the gate, then a target. Shapes as `predict`."""
        rng = check_random_state(random_state)
        u, z = self._features(X)
        label = draw_labels(self.mixture_.share(u), rng)
        return self._units(self.mixture_.expert.sample(self.mixture_.expert_params, z, label, rng))
