"""Fitting by gradients: the likelihood, or the squared errors of 1991, climbed by L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import minimize

from moestro.mixtures import covariance as shapes
from moestro.mixtures.experts.base import ridge
from moestro.mixtures.experts.gaussian import GaussianExpert
from moestro.mixtures.fitting.em import Fit
from moestro.mixtures.gates import SoftmaxGate
from moestro.mixtures.losses import LOSSES
from moestro.mixtures.mixture import Mixture
from moestro.mixtures.numerics import Array, predictions, scatter
from moestro.mixtures.rows import Rows

_WALL = 1e25


def check(mixture: Mixture, loss: str, branching: tuple[int, ...]) -> None:
    """Raise ValueError for parts that have no gradient or a loss that they cannot follow."""
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is unknown; pass one of {', '.join(LOSSES)}")
    for each in (mixture.gate, mixture.expert):
        if not each.parametric:
            raise ValueError(f"algorithm='gradient' needs finitely many numbers, which {each!r} has not; pass 'em'")
    if not mixture.expert.smooth:
        raise ValueError(
            f"algorithm='gradient' needs a smooth density, not {mixture.expert!r}; pass algorithm='em'"
        )
    if loss == "mixture":
        return
    flat = isinstance(mixture.gate, SoftmaxGate) and len(branching) == 1
    if not (flat and isinstance(mixture.expert, GaussianExpert)):
        raise ValueError(
            f"loss={loss!r} is a squared error of normal experts under a flat softmax gate; pass those"
        )


def run(
    mixture: Mixture, rows: Rows, loss: str, tol: float, max_iter: int, report: Callable[[int, float], None]
) -> Fit:
    """Climbs from the given mixture until the mean objective changes by less than tol."""
    objective = _Likelihood(mixture, rows) if loss == "mixture" else _SquaredError(mixture, rows, loss)
    path = [-objective(objective.start)[0] * rows.total]

    def note(numbers: Array) -> None:
        path.append(-objective(numbers)[0] * rows.total)
        report(len(path) - 1, path[-1] / rows.total)

    scale = max(1.0, abs(path[0] / rows.total))
    found = minimize(
        objective,
        objective.start,
        jac=True,
        method="L-BFGS-B",
        callback=note,
        options={"maxiter": max_iter, "maxfun": 10 * max_iter, "ftol": tol / scale / 10, "gtol": 1e-7},
    )
    return Fit(objective.mixture_at(found.x), path, int(found.nit), found.nit < max_iter)


class _Likelihood:
    """Minus the mean penalised log-likelihood, in the free numbers of the mixture."""

    def __init__(self, mixture: Mixture, rows: Rows):
        self.mixture, self.rows, self.start = mixture, rows, mixture.free()

    def mixture_at(self, numbers: Array) -> Mixture:
        return self.mixture.restore(numbers)

    def __call__(self, numbers: Array) -> tuple[float, Array]:
        with np.errstate(over="ignore", invalid="ignore"):
            here = self.mixture_at(numbers)
            if self._below_floor(here):
                return _WALL, np.zeros_like(numbers)
            value, slope = here.objective(self.rows), here.gradient(self.rows)
        if not (np.isfinite(value) and np.isfinite(slope).all()):
            return _WALL, np.zeros_like(numbers)
        return -value / self.rows.total, -slope / self.rows.total

    def _below_floor(self, mixture: Mixture) -> bool:
        """Whether a step left the models that the floor allows; the line search then shortens it."""
        spread = mixture.expert_params.get("covariance")
        if spread is None or getattr(mixture.expert, "fixed_variance", None) is not None:
            scale = mixture.expert_params.get("scale")
            return scale is not None and bool((scale**2 < self.rows.floor).any())
        return not np.isfinite(spread).all() or bool(np.linalg.eigvalsh(spread).min() < 0.5 * self.rows.floor)


class _SquaredError:
    """Mean blended or expected squared error with the parts' ridges, in gate and expert coefficients."""

    def __init__(self, mixture: Mixture, rows: Rows, loss: str):
        assert isinstance(mixture.gate, SoftmaxGate)
        assert isinstance(mixture.expert, GaussianExpert)
        self.mixture, self.rows, self.loss = mixture, rows, LOSSES[loss]
        self.gate, self.expert = mixture.gate, mixture.expert
        self.split = len(mixture.gate.free(mixture.gate_params))
        self.start = np.concatenate([mixture.gate.free(mixture.gate_params), mixture.expert_params["coef"].ravel()])
        self.weight = rows.weight / rows.total

    def _coefficients(self, numbers: Array) -> tuple[dict[str, list[Array]], Array]:
        gate_params = self.gate.restore(numbers[: self.split], self.mixture.gate_params)
        return gate_params, numbers[self.split :].reshape(self.mixture.expert_params["coef"].shape)

    def __call__(self, numbers: Array) -> tuple[float, Array]:
        gate_params, coef = self._coefficients(numbers)
        rows = self.rows
        logits = self.gate.log_weight(gate_params, rows.u)
        value, by_logit, by_output = self.loss(logits, predictions(rows.z, coef), rows.y)
        flat = gate_params["coef"][0][0]
        by_gate = (self.weight[:, None] * by_logit[:, :-1]).T @ rows.u + self.gate.prior_slope(
            flat, rows
        ) / rows.total
        pull = self.weight[:, None, None] * by_output
        by_coef = np.stack([rows.z.T @ pull[:, i] for i in range(len(coef))])
        weights = ridge(rows, self.expert.alpha)[:, None] / rows.total
        total = float(self.weight @ value) + self.gate.penalty(gate_params, rows) / rows.total
        total += float((weights * coef**2).sum())
        return total, np.concatenate([by_gate.ravel(), (by_coef + 2 * weights * coef).ravel()])

    def mixture_at(self, numbers: Array) -> Mixture:
        """Variances are those of the errors under the gate's probabilities."""
        gate_params, coef = self._coefficients(numbers)
        rows = self.rows
        mass = rows.weight[:, None] * np.exp(self.gate.log_weight(gate_params, rows.u))
        spread = scatter(rows.y[:, None] - predictions(rows.z, coef), mass)
        covariance = self.mixture.expert_params["covariance"]
        if self.expert.fixed_variance is None:
            covariance = shapes.maximise(spread, mass.sum(0), self.expert.covariance, rows.floor)
        return replace(
            self.mixture, gate_params=gate_params, expert_params={"coef": coef, "covariance": covariance}
        )
