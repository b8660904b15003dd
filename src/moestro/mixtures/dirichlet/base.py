"""What the two samplers share: their counts, their chains, their traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from moestro.mixtures.dirichlet.mcmc import Chain, Schedule, diagnose, run_chain
from moestro.mixtures.numerics import Array


class DirichletProcess(BaseEstimator):
    """A mixture under a Dirichlet process, sampled by a few chains; `_concentration` names its concentration."""

    _concentration: str
    n_burn: int
    n_samples: int
    thin: int
    n_chains: int
    n_auxiliary: int
    n_init_experts: int
    random_state: Any
    verbose: int
    n_jobs: int | None

    def _schedule(self) -> Schedule:
        counts = (self.n_samples, self.thin, self.n_chains, self.n_auxiliary, self.n_init_experts)
        if min(counts) < 1 or self.n_burn < 0:
            raise ValueError(
                f"n_samples={self.n_samples}, thin={self.thin}, n_chains={self.n_chains}, "
                f"n_auxiliary={self.n_auxiliary} and n_init_experts={self.n_init_experts} must be at least 1 and "
                f"n_burn={self.n_burn} at least 0"
            )
        return Schedule(self.n_burn, self.n_samples, self.thin, self.verbose)

    def _sample(
        self, make: Callable[[int], Chain], schedule: Schedule
    ) -> tuple[list[Chain], np.random.RandomState]:
        """Runs the chains that `make` gives for seeds and keeps their traces; a generator for what comes after."""
        seeds = check_random_state(self.random_state).randint(2**31 - 1, size=self.n_chains)
        chains: list[Chain] = Parallel(n_jobs=self.n_jobs)(
            delayed(run_chain)(make, int(seed), schedule, number) for number, seed in enumerate(seeds)
        )
        draws = [chain.draws for chain in chains]
        self.samples_ = [draw for each in draws for draw in each]
        self.n_experts_trace_ = np.array([[draw.num_experts for draw in each] for each in draws])
        self.log_likelihood_trace_ = np.array([[draw.log_likelihood for draw in each] for each in draws])
        trace = np.array([[getattr(draw, self._concentration) for draw in each] for each in draws])
        setattr(self, f"{self._concentration}_trace_", trace)
        together: Any = 0.0
        for draw in self.samples_:
            together = together + (draw.label[:, None] == draw.label)
        self.coclustering_: Array = together / len(self.samples_)
        self.n_iter_ = schedule.total
        return chains, np.random.RandomState(int(seeds[0]))

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Mean, deviation, effective sample size and split R-hat of the label-free traces.

        R-hat above about 1.05 or fewer than some dozens of effective draws ask for longer chains.
        """
        check_is_fitted(self)
        return diagnose(
            {
                "n_experts": self.n_experts_trace_.astype(np.float64),
                self._concentration: getattr(self, f"{self._concentration}_trace_"),
                "log_likelihood": self.log_likelihood_trace_,
            }
        )
