"""ARIMA(p, 1, q) of every expert's share, fitted by conditional least squares."""

from __future__ import annotations

import numpy as np

from moestro.parallel.loads import Load, load_shares

_SWEEPS, _ENOUGH = 50, 1e-10


def arima(history: Load, horizon: int, order: int = 5, errors: int = 5) -> np.ndarray:
    """Each expert's change as a linear function of its last changes and of the last errors of that function.

        d[t] = sum_i a_i d[t - i] + sum_j b_j e[t - j] + e[t],   d = differences of shares     Cong et al. 2024

    Coefficients minimise the sum of e[t]^2 with the errors before the first step taken as zero. The paper leaves
    the fit to a library's likelihood, from which this differs by what those first errors would have been. Forecasts
    are kept between 0 and 1 and sum to 1, so that a series that would explode is damped.

    Args:
        history: `[steps, experts]`.
        horizon: steps to foresee.
        order: changes looked back upon, p.
        errors: errors looked back upon, q; 0 = autoregression, which is linear least squares.

    Shapes: -> `[horizon, experts]`.

    Raises:
        ValueError: fewer steps than `least_steps(order, errors)`.
    """
    shares = load_shares(history)
    if order < 0 or errors < 0 or order + errors < 1 or len(shares) < least_steps(order, errors):
        raise ValueError(
            f"{len(shares)} steps are too few to fit order={order} and errors={errors}; "
            f"pass at least {least_steps(order, errors)} steps, and an order or errors from 1 on"
        )
    change = np.diff(shares, axis=0)
    coefficient, error = fit(change, order, errors)
    recent, missed = list(change[::-1][:order]), list(error[::-1][:errors])
    now, forecast = shares[-1], []
    for _ in range(horizon):
        step = (coefficient * np.stack([*recent, *missed])).sum(0)
        new = np.clip(now + step, 0, 1)
        new = new / max(new.sum(), 1e-300)
        recent, missed = [new - now, *recent][:order], [np.zeros_like(now), *missed][:errors]
        now = new
        forecast.append(new)
    return np.array(forecast).reshape(horizon, -1)


def least_steps(order: int, errors: int) -> int:
    """Steps without which there are fewer equations than coefficients, or no errors to begin with."""
    return 2 * (order + errors) + order + 1 if errors else 2 * order + 1


def fit(change: np.ndarray, order: int, errors: int) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients, those of changes first, and the errors that they leave.

    Begins with the regressions of Hannan and Rissanen (1982), then Levenberg and Marquardt, all experts at once.

    Shapes: change `[steps, experts]` -> `[order + errors, experts]`, `[steps, experts]`.
    """
    start = _regression(change, change, order, 0)
    if not errors:
        return start, _errors(change, start, order)
    best = np.concatenate([start, np.zeros((errors, change.shape[1]))])
    found = _errors(change, best, order)
    rough = _regression(
        change, _errors(change, _regression(change, change, order + errors, 0), order + errors), order, errors
    )
    best, found = _better(change, order, best, found, rough)[:2]
    damping = np.full(change.shape[1], 1e-3)
    for _ in range(_SWEEPS):
        slope = _slope(change, best, found, order)
        gradient = np.einsum("tke,te->ek", slope, found)
        normal = np.einsum("tke,tle->ekl", slope, slope)
        scale = np.einsum("ekk->ek", normal) + 1e-300
        damped = normal + np.einsum("e,ek,kl->ekl", damping, scale, np.eye(len(best)))
        move = np.linalg.solve(
            damped + 1e-14 * scale.max(1)[:, None, None] * np.eye(len(best)), gradient[..., None]
        )[..., 0].T
        before = (found**2).sum(0)
        best, found, gained = _better(change, order, best, found, best + move)
        damping = np.where(gained, damping / 5, damping * 5)
        if ((before - (found**2).sum(0) <= _ENOUGH * before) & (gained | (damping > 1e6))).all():
            break
    return best, found


def _lagged(series: np.ndarray, count: int) -> np.ndarray:
    """The last `count` values before each step, nearest first, zero before all; `[count, steps, experts]`."""
    padded = np.concatenate([np.zeros((count, series.shape[1])), series])
    return (
        np.stack([padded[count - lag : count - lag + len(series)] for lag in range(1, count + 1)])
        if count
        else padded[None, :0]
    )


def _regression(change: np.ndarray, error: np.ndarray, order: int, errors: int) -> np.ndarray:
    """Ordinary least squares of changes on lagged changes and errors, `[order + errors, experts]`."""
    blocks = [_lagged(series, count) for series, count in ((change, order), (error, errors)) if count]
    first = order + errors
    if not blocks:
        return np.zeros((0, change.shape[1]))
    lagged = np.concatenate(blocks)[:, first:]
    fits = [np.linalg.lstsq(lagged[:, :, e].T, change[first:, e], rcond=None)[0] for e in range(change.shape[1])]
    return np.stack(fits, axis=1)


def _errors(change: np.ndarray, coefficient: np.ndarray, order: int) -> np.ndarray:
    """What the coefficients leave of each change from step `order` on; before that zero."""
    error = np.zeros_like(change)
    count = len(coefficient) - order
    known = (
        change - np.einsum("ke,kte->te", coefficient[:order], _lagged(change, order)) if order else change.copy()
    )
    if not count:
        error[order:] = known[order:]
        return error
    reversed_errors = coefficient[order:][::-1]
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(order, len(change)):
            first = max(0, step - count)
            error[step] = known[step] - (reversed_errors[count - (step - first) :] * error[first:step]).sum(0)
    return error


def _slope(change: np.ndarray, coefficient: np.ndarray, error: np.ndarray, order: int) -> np.ndarray:
    """How each error falls with each coefficient, `[steps, order + errors, experts]`."""
    count = len(coefficient) - order
    direct = np.concatenate([_lagged(change, order), _lagged(error, count)]) if order else _lagged(error, count)
    slope = np.ascontiguousarray(direct.transpose(1, 0, 2))
    slope[:order] = 0
    reversed_errors = coefficient[order:][::-1][:, None]
    for step in range(order + 1, len(change)):
        first = max(0, step - count)
        slope[step] -= (reversed_errors[count - (step - first) :] * slope[first:step]).sum(0)
    return slope


def _better(
    change: np.ndarray, order: int, best: np.ndarray, found: np.ndarray, tried: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each expert those coefficients with the smaller sum of squares, their errors, and whether the tried."""
    error = _errors(change, tried, order)
    with np.errstate(over="ignore", invalid="ignore"):
        gained = np.nan_to_num((error**2).sum(0), nan=np.inf) < (found**2).sum(0)
    return np.where(gained, tried, best), np.where(gained, error, found), gained
