"""What the regressor and the classifier share: fitting, densities, criteria, errors of the parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from joblib import Parallel, delayed
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    is_classifier,
)
from sklearn.utils import Tags, check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from moestro.mixtures import errors
from moestro.mixtures.choices import part, wrapped
from moestro.mixtures.experts import Expert
from moestro.mixtures.fitting import em, gradient
from moestro.mixtures.fitting.start import STARTS
from moestro.mixtures.fitting.stopping import STOPPING
from moestro.mixtures.gates import GATES, Gate, SoftmaxGate
from moestro.mixtures.mixture import Mixture
from moestro.mixtures.numerics import Array, softmax_rows
from moestro.mixtures.rows import Rows, Scaling, merge_repeats

_TRIAL = 100  # iterations that every start gets; only the best goes on


def _generative(estimator: Any) -> bool:
    return part(estimator.gate, GATES, "gate").generative


def _fits_any_target(estimator: Any) -> bool:
    return estimator._chosen_expert().target != "positive"


class MixtureOfExperts(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Base of the two estimators; `transform` returns the gate probabilities."""

    _experts: dict[str, Callable[[], Expert]]

    def __init__(
        self,
        n_experts: int | None = None,
        *,
        branching: tuple[int, ...] | None = None,
        gate: str | Gate = "softmax",
        expert: str | Expert = "linear",
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

    def _known(self, y: Any) -> Array:
        """Targets of a fitted estimator's methods as a matrix."""
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
        previous = self._previous(gate, expert, num_experts, target)
        scaling = self.scaling_ if previous else self._scaling_of(expert, x, target, weight)
        rows = self._rows(gate, expert, scaling, x, target, weight)
        if previous:
            fits = [self._continue(previous, rows)]
        else:
            fits = self._restarts(
                Mixture(gate, expert, {}, {}), branching, rows, scaling.x(expert.covariates(x)), used
            )
        best = self._go_on(self._best(fits, rows), rows)
        em.warn_about(best, rows, self.tol, self.max_iter)
        return self._keep(best, rows, scaling)

    def _chosen_expert(self) -> Expert:
        found: Expert = part(wrapped(self.expert), self._experts, "expert")
        if is_classifier(self) != (found.target == "class"):
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

    def _rows(self, gate: Gate, expert: Expert, scaling: Scaling, x: Array, y: Array, weight: Array) -> Rows:
        real = expert.target == "real"
        return Rows(
            gate.design(expert.covariates(x), scaling),
            expert.regressors(x, scaling),
            scaling.y(y) if real else y,
            weight,
            scaling,
            max(self.reg_covar, 1e-300),
        )

    def _previous(self, gate: Gate, expert: Expert, num_experts: int, y: Array) -> Mixture | None:
        """The fitted mixture where warm_start can go on with it."""
        if not (self.warm_start and hasattr(self, "mixture_")):
            return None
        same = repr((gate, expert)) == repr((self.mixture_.gate, self.mixture_.expert))
        shape = (num_experts, y.shape[1], self.n_features_in_)
        if not same or shape != self._fitted_shape:
            raise ValueError(
                "warm_start=True needs the gate, expert, n_experts, features and targets of the first fit; "
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

    def _keep(self, fit: em.Fit, rows: Rows, scaling: Scaling) -> Self:
        mixture = fit.mixture
        joint = mixture.joint(rows.u, rows.z, rows.y)
        self.mixture_, self.scaling_ = mixture, scaling
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

    def _describe(self) -> None:
        """Parameters in the user's units as attributes."""
        for params in (
            self.mixture_.gate.attributes(self.mixture_.gate_params, self.scaling_),
            self.mixture_.expert.attributes(self.mixture_.expert_params, self.scaling_),
        ):
            for name, value in params.items():
                setattr(self, name, value)

    def _log_volume(self) -> float:
        """What the standardised log-density of a row is too large by."""
        return self.scaling_.log_volume() + self.mixture_.gate.log_volume(self.scaling_)

    # ------------------------------------------------------------- densities

    def _features(self, X: Any) -> tuple[Array, Array]:
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        gate, expert = self.mixture_.gate, self.mixture_.expert
        return gate.design(expert.covariates(x), self.scaling_), expert.regressors(x, self.scaling_)

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
        return softmax_rows(weight)[0] - self.mixture_.gate.log_volume(self.scaling_)

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
            return errors.attribute_errors(self.mixture_, rows, self.scaling_)
        rng = check_random_state(self.random_state)

        def refit(resampled: Rows) -> Mixture:
            return self._run(self.mixture_, resampled, rng, lambda iteration, value: None, self.max_iter).mixture

        return errors.bootstrap_errors(self.mixture_, rows, self.scaling_, refit, n_resamples, rng)

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
        estimates = errors.attributes(self.mixture_, self.scaling_)
        return "\n".join([*lines, errors.table(estimates, found)])

    def _rows_of(self, X: Any, y: Any, sample_weight: Any) -> Rows:
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        return self._rows(self.mixture_.gate, self.mixture_.expert, self.scaling_, x, self._known(y), weight)

    def to_moe(self, **options: Any) -> Any:
        """The layer that computes what this mixture predicts; see `moestro.mixtures.torch.to_moe`. Needs torch."""
        from moestro.mixtures.torch import to_moe

        return to_moe(self, **options)

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


# scikit-learn replaces these two when the class is made, so their condition can only be put on afterwards
for _name in ("transform", "fit_transform"):
    setattr(MixtureOfExperts, _name, available_if(_fits_any_target)(getattr(MixtureOfExperts, _name)))
