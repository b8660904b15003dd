"""How the regressor and the classifier are fitted: options, starts, and the run that goes on with the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
from joblib import Parallel, delayed
from sklearn.base import (
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils import Tags, check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import _check_sample_weight

from moestro.mixtures.choices import feature_columns, part, wrapped
from moestro.mixtures.experts import Expert
from moestro.mixtures.fitted import FittedMixture
from moestro.mixtures.fitting import em, gradient
from moestro.mixtures.fitting.start import STARTS
from moestro.mixtures.fitting.stopping import STOPPING
from moestro.mixtures.gates import GATES, Gate
from moestro.mixtures.mixture import Mixture
from moestro.mixtures.numerics import Array, softmax_rows
from moestro.mixtures.rows import Rows, Scaling, Sides, merge_repeats

_TRIAL = 100  # iterations that every start gets; only the best goes on


def _fits_any_target(estimator: Any) -> bool:
    return estimator._chosen_expert().target != "positive"


class MixtureOfExperts(ClassNamePrefixFeaturesOutMixin, TransformerMixin, FittedMixture):
    """Base of the two estimators; `transform` returns the gate probabilities."""

    _experts: dict[str, Callable[[], Expert]]

    def __init__(
        self,
        n_experts: int | None = None,
        *,
        branching: tuple[int, ...] | None = None,
        gate: str | Gate = "softmax",
        expert: str | Expert = "linear",
        gate_features: Any = None,
        expert_features: Any = None,
        algorithm: str = "em",
        loss: str = "mixture",
        stopping: str = "change",
        tol: float = 1e-6,
        max_iter: int = 500,
        n_init: int = 5,
        init: Any = "auto",
        reg_covar: float = 1e-6,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
        n_jobs: int | None = None,
    ):
        self.n_experts = n_experts
        self.branching = branching
        self.gate = gate
        self.expert = expert
        self.gate_features = gate_features
        self.expert_features = expert_features
        self.algorithm = algorithm
        self.loss = loss
        self.stopping = stopping
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.init = init
        self.reg_covar = reg_covar
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
        self.n_jobs = n_jobs

    # ---------------------------------------------------------------- fitting

    def _encode(self, y: Any) -> Array:
        """Targets as a matrix `[rows, outputs]`; sets what `predict` needs to answer in the same form."""
        raise NotImplementedError

    def _check_target(self, y: Array, expert: Expert) -> None:
        raise NotImplementedError

    def _validate(self, X: Any, y: Any) -> tuple[Array, Any]:
        raise NotImplementedError

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit gate and experts.

        Args:
            X: inputs `[rows, features]`.
            y: targets `[rows]` or `[rows, outputs]`.
            sample_weight: how often each row counts; weight 0 is the same as leaving the row out.

        Raises:
            ValueError: for inputs that are not finite numbers, targets outside the experts' support, fewer rows
                than experts, no positive weight, or options that do not exist.
        """
        gate, expert, branching = self._parts()
        x, y = self._validate(X, y)
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        used = weight > 0
        target = self._encode(y[used])
        x, weight = x[used], weight[used]
        self._check_target(target, expert)
        if isinstance(self.init, str):  # given shares belong to the rows as they are
            x, target, weight = merge_repeats(x, target, weight)
        num_experts = int(np.prod(branching))
        if weight.sum() < num_experts:
            raise ValueError(f"n_samples={len(y)} rows are fewer than n_experts={num_experts}; fit fewer experts")
        columns = self._columns(expert)
        previous = self._previous(gate, expert, columns, num_experts, target)
        sides = self._sides if previous else Sides.of(self._scaling_of(expert, x, target, weight), *columns)
        rows = self._rows(gate, expert, sides, x, target, weight)
        if previous:
            fits = [self._continue(previous, rows)]
        else:
            fits = self._restarts(
                Mixture(gate, expert, {}, {}), branching, rows, sides.whole.x(expert.covariates(x)), used
            )
        best = self._go_on(self._best(fits, rows), rows)
        em.warn_about(best, rows, self.tol, self.max_iter)
        return self._keep(best, rows, sides)

    def _chosen_expert(self) -> Expert:
        found: Expert = part(wrapped(self.expert), self._experts, "expert")
        if isinstance(self, ClassifierMixin) != (found.target == "class"):  # tags ask here: ask no tags
            explains = "classes" if found.target == "class" else "numbers"
            raise ValueError(f"expert={self.expert!r} explains {explains}, but {type(self).__name__} does not")
        return found

    def _parts(self) -> tuple[Gate, Expert, tuple[int, ...]]:
        gate, expert = part(self.gate, GATES, "gate"), self._chosen_expert()
        if self.branching is None:
            branching: tuple[int, ...] = (2 if self.n_experts is None else self.n_experts,)
        else:
            branching = tuple(self.branching)
        leaves = int(np.prod(branching))
        if not branching or min(branching) < 1:
            raise ValueError(
                f"branching={self.branching} or n_experts={self.n_experts} has no experts; pass 1 or more"
            )
        if self.n_experts not in (None, leaves):
            raise ValueError(
                f"n_experts={self.n_experts} but branching={self.branching} has {leaves} leaves; pass one of them"
            )
        if len(branching) > 1 and not gate.hierarchical:
            raise ValueError(f"branching={self.branching} needs a softmax gate, not gate={self.gate!r}")
        if self.algorithm not in (*em.ALGORITHMS, "gradient"):
            known = ", ".join(em.ALGORITHMS)
            raise ValueError(f"algorithm={self.algorithm!r} is unknown; pass one of {known}, gradient")
        if self.algorithm == "gradient":
            gradient.check(Mixture(gate, expert, {}, {}), self.loss, branching)
        elif self.loss != "mixture":
            raise ValueError(
                f"loss={self.loss!r} needs algorithm='gradient'; {self.algorithm!r} climbs the likelihood"
            )
        if self.stopping not in STOPPING or (self.stopping != "change" and self.algorithm not in em.ALGORITHMS):
            raise ValueError(
                f"stopping={self.stopping!r} is unknown or no rule of algorithm={self.algorithm!r}; pass one of "
                f"{', '.join(STOPPING)} with an EM algorithm"
            )
        if isinstance(self.init, str) and self.init not in ("auto", *STARTS):
            raise ValueError(f"init={self.init!r} is unknown; pass auto, {', '.join(STARTS)} or an array of shares")
        if self.n_init < 1 or self.max_iter < 1 or self.tol < 0 or self.reg_covar < 0:
            raise ValueError(
                f"n_init={self.n_init} and max_iter={self.max_iter} must be at least 1, "
                f"tol={self.tol} and reg_covar={self.reg_covar} at least 0"
            )
        return gate, expert, branching

    @staticmethod
    def _scaling_of(expert: Expert, x: Array, y: Array, weight: Array) -> Scaling:
        return Scaling.of(expert.covariates(x), y, weight, expert.target == "real")

    def _columns(self, expert: Expert) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Which covariates the gate and the experts read."""
        names = getattr(self, "feature_names_in_", None)
        places = expert.covariates(np.arange(self.n_features_in_, dtype=np.float64)[None])[0].astype(int)
        return (
            feature_columns(self.gate_features, places, names, "gate"),
            feature_columns(self.expert_features, places, names, "expert"),
        )

    def _previous(
        self, gate: Gate, expert: Expert, columns: tuple[Any, Any], num_experts: int, y: Array
    ) -> Mixture | None:
        """The fitted mixture where warm_start can go on with it."""
        if not (self.warm_start and hasattr(self, "mixture_")):
            return None
        same = repr((gate, expert)) == repr((self.mixture_.gate, self.mixture_.expert))
        same = same and columns == self._sides.columns
        shape = (num_experts, y.shape[1], self.n_features_in_)
        if not same or shape != self._fitted_shape:
            raise ValueError(
                "warm_start=True needs the gate, expert, features, n_experts and targets of the first fit; "
                "set warm_start=False to start anew"
            )
        return self.mixture_

    def _continue(self, previous: Mixture, rows: Rows) -> em.Fit:
        rng = check_random_state(self.random_state)
        return self._run(previous, rows, rng, self._reporter("warm start"), self.max_iter)

    def _best(self, fits: list[em.Fit], rows: Rows) -> em.Fit:
        best = fits[0]
        for fit in fits[1:]:  # a tie goes to the earlier start, so that rounding does not choose
            if max(fit.path) > max(best.path) + self.tol * rows.total:
                best = fit
        return best

    def _go_on(self, fit: em.Fit, rows: Rows) -> em.Fit:
        """Finishes a start that was stopped early."""
        if fit.converged or fit.num_steps >= self.max_iter:
            return fit
        rng, report = check_random_state(self.random_state), self._reporter("best start")
        rest = self._run(fit.mixture, rows, rng, report, self.max_iter, fit.num_steps)
        steps = fit.num_steps + rest.num_steps
        return em.Fit(rest.mixture, [*fit.path[:-1], *rest.path], steps, rest.converged)

    def _run(
        self,
        first: Mixture,
        rows: Rows,
        rng: np.random.RandomState,
        report: Callable[[int, float], None],
        max_iter: int,
        begin: int = 0,
    ) -> em.Fit:
        if self.algorithm == "gradient":
            return gradient.run(first, rows, self.loss, self.tol, max_iter - begin, report)
        return em.run(
            em.ALGORITHMS[self.algorithm],
            first,
            rows,
            self.tol,
            max_iter,
            rng,
            report,
            begin,
            STOPPING[self.stopping],
        )

    def _refit(self, rows: Rows) -> Mixture:
        rng = check_random_state(self.random_state)
        return self._run(self.mixture_, rows, rng, lambda iteration, value: None, self.max_iter).mixture

    def _restarts(
        self, blank: Mixture, branching: tuple[int, ...], rows: Rows, x: Array, used: Array
    ) -> list[em.Fit]:
        num_experts = int(np.prod(branching))
        seeds = check_random_state(self.random_state).randint(2**31 - 1, size=self.n_init)
        given = None if isinstance(self.init, str) else self._given_shares(used, num_experts)
        if given is not None or num_experts == 1:
            seeds = seeds[:1]

        def one(run: int, seed: int) -> em.Fit:
            rng = np.random.RandomState(seed)
            share = given
            if share is None:
                kind = list(STARTS)[run % len(STARTS)] if self.init == "auto" else self.init
                share = STARTS[kind](x, rows, branching, run, rng)
            first = em.first_mixture(blank, rows, share, branching)
            report = self._reporter(f"start {run + 1}/{len(seeds)}")
            return self._run(
                first, rows, rng, report, min(_TRIAL, self.max_iter) if len(seeds) > 1 else self.max_iter
            )

        return Parallel(n_jobs=self.n_jobs)(delayed(one)(run, seed) for run, seed in enumerate(seeds))

    def _given_shares(self, used: Array, num_experts: int) -> Array:
        share = np.asarray(self.init, dtype=np.float64)
        if share.shape != (len(used), num_experts):
            raise ValueError(f"init has shape {share.shape}; pass shares of shape ({len(used)}, {num_experts})")
        return share[used]

    def _reporter(self, label: str) -> Callable[[int, float], None]:
        verbose = self.verbose

        def report(iteration: int, objective: float) -> None:
            if verbose > 1 or (verbose and iteration % 10 == 0):
                print(f"{label}, iteration {iteration}: mean objective {objective:.8g}", flush=True)

        return report

    def _keep(self, fit: em.Fit, rows: Rows, sides: Sides) -> Self:
        mixture = fit.mixture
        joint = mixture.joint(rows.u, rows.z, rows.y)
        self.mixture_, self.scaling_, self._sides = mixture, sides.whole, sides
        self.n_iter_, self.converged_ = max(fit.num_steps, 1), fit.converged
        volume = self._log_volume()
        squared = self.algorithm == "gradient" and self.loss != "mixture"  # an error has no units of density
        self.loglik_path_ = np.asarray(fit.path) - (0.0 if squared else volume * rows.total)
        self.lower_bound_ = float(self.loglik_path_[-1] / rows.total)
        self.loglik_ = float(rows.weight @ softmax_rows(joint)[0]) - volume * rows.total
        self.n_parameters_ = mixture.count()
        share = mixture.share(rows.u)
        self.weights_ = rows.weight @ share / rows.total
        self._fitted_shape = (share.shape[1], rows.y.shape[1], self.n_features_in_)
        self._describe()
        return self

    def transform(self, X: Any) -> Array:
        """Gate probabilities as features, `[rows, experts]`.

        Not for experts of positive targets: scikit-learn's transformers must accept any y in `fit`.
        """
        return self.gate_proba(X)

    @property
    def _n_features_out(self) -> int:
        return self._fitted_shape[0]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        if not hasattr(self, "transform"):
            tags.transformer_tags = None
        return tags

    def to_moe(self, **options: Any) -> Any:
        """The layer that computes what this mixture predicts; see `moestro.mixtures.torch.to_moe`. Needs torch."""
        from moestro.mixtures.torch import to_moe

        return to_moe(self, **options)


# scikit-learn replaces these two when the class is made, so their condition can only be put on afterwards
for _name in ("transform", "fit_transform"):
    setattr(MixtureOfExperts, _name, available_if(_fits_any_target)(getattr(MixtureOfExperts, _name)))
