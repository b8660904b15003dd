"""The Dirichlet process mixture of multinomial logits, sampled (Shahbaba & Neal 2009)."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from moestro.mixtures.dirichlet.base import DirichletProcess
from moestro.mixtures.dirichlet.logit_chain import (
    LogitChain,
    Settings,
    draw_components,
    log_classes,
    log_inputs,
)
from moestro.mixtures.numerics import Array, softmax_rows, weighted_moments

_PRIOR_DRAWS = 20  # components of the base measure, at prediction


class DirichletProcessMixtureOfExpertsClassifier(ClassifierMixin, DirichletProcess):
    """A nonlinear classifier made of linear ones: every component models its inputs and its classes.

        x_k | θ ~ N(μ_k, σ_k²),  P(y = c | x, θ) = softmax_c(a_c + xᵀb_c),  θ_t ~ G,  G ~ DP(γ, G0)
                                                                    Shahbaba & Neal 2009
    Base measure: μ ~ N(0, 1), log σ² ~ N(-1, 1), a_c ~ N(0, τ²), b_kc ~ N(0, ν²), log τ², log ν² ~ N(0, 1),
    log γ ~ N(-3, 4), on standardised inputs. Labels by Gibbs sampling with auxiliary components (Neal 2000,
    algorithm 8), means in closed form, the rest by slice sampling. Departure: the priors of μ and σ are fixed where
    the paper gives them hyperpriors. Predictions average the kept draws and use no random numbers. With many
    inputs the components describe x more than y.

    Args:
        n_burn: sweeps that are forgotten, per chain.
        n_samples: draws that are kept, per chain.
        thin: sweeps per kept draw.
        n_chains: independent chains; two or more let `diagnostics` compare them.
        n_auxiliary: empty components that are offered to every row.
        concentration: fix γ instead of learning it.
        n_init_experts: components at the start, clusters of inputs: too many merge easily, too few seldom split.
        random_state: seed.
        verbose: report every tenth sweep.
        n_jobs: processes for the chains.

    Attributes: `classes_`, `n_experts_trace_`, `concentration_trace_`, `log_likelihood_trace_` `[chains, draws]`,
    `coclustering_` `[rows, rows]` (how often two rows shared a component), `samples_`, `n_iter_`.
    """

    _concentration = "concentration"

    def __init__(
        self,
        *,
        n_burn: int = 50,
        n_samples: int = 50,
        thin: int = 1,
        n_chains: int = 2,
        n_auxiliary: int = 5,
        concentration: float | None = None,
        n_init_experts: int = 4,
        random_state: Any = None,
        verbose: int = 0,
        n_jobs: int | None = None,
    ):
        self.n_burn = n_burn
        self.n_samples = n_samples
        self.thin = thin
        self.n_chains = n_chains
        self.n_auxiliary = n_auxiliary
        self.concentration = concentration
        self.n_init_experts = n_init_experts
        self.random_state = random_state
        self.verbose = verbose
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any) -> Self:
        """Sample the posterior given inputs `[rows, features]` and class labels `[rows]`."""
        x, y = validate_data(self, X, y, dtype=np.float64)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        schedule, settings = self._schedule(), self._settings()
        self.classes_, target = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class, {self.classes_[0]!r}; this classifier needs at least two classes")
        self._center, self._scale = weighted_moments(x, np.ones(len(x)))
        standard = (x - self._center) / self._scale
        _, rng = self._sample(partial(LogitChain, standard, target, len(self.classes_), settings), schedule)
        scales = np.mean([draw.scales for draw in self.samples_], axis=0)
        self._empty = draw_components(_PRIOR_DRAWS, standard.shape[1], len(self.classes_), scales, rng)
        return self

    def _settings(self) -> Settings:
        if self.concentration is not None and not self.concentration > 0:
            raise ValueError(f"concentration={self.concentration} must be above 0")
        return Settings(self.n_auxiliary, self.concentration, self.n_init_experts)

    def predict_proba(self, X: Any) -> Array:
        """`P(c | x, data)`, `[rows, classes]`: every draw's components weighted by their density of x."""
        check_is_fitted(self)
        x = (validate_data(self, X, dtype=np.float64, reset=False) - self._center) / self._scale
        empty_inputs, empty_classes = log_inputs(x, self._empty), np.exp(log_classes(x, self._empty))
        total = np.zeros((len(x), len(self.classes_)))
        for draw in self.samples_:
            by_empty = np.log(draw.concentration / _PRIOR_DRAWS) + empty_inputs
            joint = np.hstack([np.log(draw.size) + log_inputs(x, draw.components), by_empty])
            classes = np.concatenate([np.exp(log_classes(x, draw.components)), empty_classes], axis=1)
            total += np.einsum("tk,tkc->tc", softmax_rows(joint)[1], classes)
        return total / total.sum(1, keepdims=True)

    def predict_log_proba(self, X: Any) -> Array:
        """Logarithms of `predict_proba`."""
        return np.log(self.predict_proba(X))

    def predict(self, X: Any) -> Any:
        """Most probable class of each row."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]
