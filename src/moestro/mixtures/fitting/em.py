"""Expectation-maximisation and its relatives: one loop, a few ways to share rows and to step.

E:  h_ti ∝ g_i(x_t) f_i(y_t | x_t)        M:  gate and experts refitted to rows weighted by w_t h_ti
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from moestro.mixtures.fitting.stopping import Stop, by_change
from moestro.mixtures.gates.base import Effort
from moestro.mixtures.mixture import Mixture
from moestro.mixtures.numerics import Array, draw_labels, is_empty, softmax_rows
from moestro.mixtures.rows import Rows

_FULL = Effort()
_ENOUGH = 0.03  # an inner step that promises less than this part of the last iteration's gain can wait
EStep = Callable[[Array, int, np.random.RandomState], tuple[Array, Array]]


@dataclass(frozen=True)
class Fit:
    """What one run of a fitting algorithm found. `path` is the monitored objective before each step."""

    mixture: Mixture
    path: list[float]
    num_steps: int
    converged: bool


@dataclass(frozen=True)
class Algorithm:
    """How to run the loop.

    Args:
        e_step: joint log-densities `[rows, experts]`, iteration, generator -> monitored value of each row, shares.
        effort: how hard the M-step tries.
        monotone: the objective never falls.
        refresh: renew the shares between the gate's and the experts' step (a multicycle ECM).
        patience: iterations that must pass before convergence is judged.
        stall: stop after this many iterations without a new best, instead of judging the last change.
    """

    e_step: EStep
    effort: Effort = _FULL
    monotone: bool = True
    refresh: bool = False
    patience: int = 1
    stall: int | None = None


def share_softly(joint: Array, iteration: int, rng: np.random.RandomState) -> tuple[Array, Array]:
    """Posterior probabilities."""
    return softmax_rows(joint)


def share_wholly(joint: Array, iteration: int, rng: np.random.RandomState) -> tuple[Array, Array]:
    """Each row to its most probable expert (Celeux & Govaert 1992); monitors the classification likelihood."""
    share = np.zeros_like(joint)
    share[np.arange(len(joint)), joint.argmax(1)] = 1.0
    return joint.max(1), share


def share_by_lot(joint: Array, iteration: int, rng: np.random.RandomState) -> tuple[Array, Array]:
    """Each row to one expert drawn from the posterior."""
    value, share = softmax_rows(joint)
    return value, np.eye(joint.shape[1])[draw_labels(share, rng)]


_WARM_STEPS = 20


def share_annealed(joint: Array, iteration: int, rng: np.random.RandomState) -> tuple[Array, Array]:
    """Posterior of the joint raised to a power that rises from 0.1 to 1 in twenty iterations."""
    value, share = softmax_rows(joint)
    power = min(1.0, 0.1 + 0.9 * iteration / _WARM_STEPS)
    return value, share if power == 1.0 else softmax_rows(power * joint)[1]


ALGORITHMS: dict[str, Algorithm] = {
    "em": Algorithm(share_softly),
    "gem": Algorithm(share_softly, Effort(steps=1)),
    "ecm": Algorithm(share_softly, Effort(steps=1), refresh=True),
    "mm": Algorithm(share_softly, Effort(steps=5, solver="bound")),
    "hard-em": Algorithm(share_wholly),
    "stochastic-em": Algorithm(share_by_lot, monotone=False, stall=50),
    "annealed-em": Algorithm(share_annealed, monotone=False, patience=_WARM_STEPS + 1),
}


def first_mixture(mixture: Mixture, rows: Rows, share: Array, branching: tuple[int, ...]) -> Mixture:
    """Gate and experts fitted to the shares of a start."""
    effort = Effort(steps=25, enough=1e-6 * rows.total)
    gate_params = mixture.gate.start(rows, share, branching, effort)
    expert_params = mixture.expert.m_step(rows, rows.weight[:, None] * share, None, effort)
    return replace(mixture, gate_params=gate_params, expert_params=expert_params)


def run(
    algorithm: Algorithm,
    mixture: Mixture,
    rows: Rows,
    tol: float,
    max_iter: int,
    rng: np.random.RandomState,
    report: Callable[[int, float], None],
    begin: int = 0,
    stop: Stop = by_change,
) -> Fit:
    """Iterates until `stop` is content with tol per row; returns the best mixture seen.

    The inner steps of an M-step stop when they promise less than 3 % of what the last whole iteration gained, or
    of tol. Every inner step that is taken raises its part of the objective, so the whole still never falls (a
    generalised EM).

    `begin` is the number of iterations that earlier runs have made.
    """
    least = tol * rows.total
    path: list[float] = []
    climbs = algorithm.monotone and mixture.climbs
    best, best_value, best_at, converged = mixture, -np.inf, begin, False
    for iteration in range(begin, max_iter + 1):
        value, share = algorithm.e_step(mixture.expected_joint(rows.u, rows.z, rows.y), iteration, rng)
        objective = float(rows.weight @ value) - mixture.penalty(rows)
        path.append(objective)
        report(iteration, objective / rows.total)
        if objective > best_value or climbs:
            best, best_value, best_at = mixture, objective, iteration
        if algorithm.stall is not None:
            converged = iteration - best_at >= algorithm.stall
        elif iteration >= max(algorithm.patience, begin + 1):
            converged = stop(path, least)
        if converged or iteration == max_iter:
            break
        gain = objective - path[-2] if climbs and len(path) > 1 else 0.0
        effort = replace(algorithm.effort, enough=_ENOUGH * max(gain, least))
        mixture = _m_step(algorithm, mixture, rows, share, effort, iteration, rng)
    if climbs:
        _check_path(path)
    return Fit(best, path, len(path) - 1, converged)


def _m_step(
    algorithm: Algorithm,
    mixture: Mixture,
    rows: Rows,
    share: Array,
    effort: Effort,
    iteration: int,
    rng: np.random.RandomState,
) -> Mixture:
    gate_params = mixture.gate.m_step(rows, share, mixture.gate_params, effort)
    moved = replace(mixture, gate_params=gate_params)
    if algorithm.refresh:
        share = algorithm.e_step(moved.expected_joint(rows.u, rows.z, rows.y), iteration, rng)[1]
    mass = rows.weight[:, None] * share
    return replace(moved, expert_params=mixture.expert.m_step(rows, mass, mixture.expert_params, effort))


def _check_path(path: list[float]) -> None:
    steps = np.diff(path)
    worst = int(steps.argmin()) if len(steps) else 0
    if len(steps) and steps[worst] < -1e-8 * (1 + abs(path[worst])):
        warnings.warn(
            f"The objective fell by {-steps[worst]:.3g} at step {worst + 1}; the fit is near a singular solution, "
            "use fewer experts or a larger reg_covar",
            ConvergenceWarning,
            stacklevel=2,
        )


def warn_about(fit: Fit, rows: Rows, tol: float, max_iter: int) -> None:
    """One warning each for a fit that did not converge and for experts that ended empty."""
    if not fit.converged:
        warnings.warn(
            f"The fit did not converge to tol={tol:g} in max_iter={max_iter} iterations; raise max_iter or tol",
            ConvergenceWarning,
            stacklevel=3,
        )
    share = softmax_rows(fit.mixture.expected_joint(rows.u, rows.z, rows.y))[1]
    empty = np.flatnonzero(is_empty(rows.weight @ share, rows.total))
    if len(empty):
        warnings.warn(
            f"Experts {empty.tolist()} explain no rows; fit fewer experts or raise n_init",
            ConvergenceWarning,
            stacklevel=3,
        )
