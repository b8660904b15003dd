"""Predictors: from the loads that experts had to those that they will have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moestro.parallel.arima import arima
from moestro.parallel.loads import Load, load_shares
from moestro.parallel.lstm import lstm

Predictor = Callable[[Load, int], np.ndarray]


def last(history: Load, horizon: int) -> np.ndarray:
    """The shares of the last step, for ever. Shapes: history `[steps, experts]` -> `[horizon, experts]`."""
    return np.repeat(load_shares(history)[-1:], horizon, axis=0)


def sliding_average(history: Load, horizon: int, window: int = 100) -> np.ndarray:
    """The mean of the last `window` steps, rolled forward: each forecast enters the window of the next.

    Cong et al. 2024 (SW_Avg): once loads are stable, as good as anything, thousands of steps ahead.

    Shapes: history `[steps, experts]` -> `[horizon, experts]`.
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1 step")
    kept = list(load_shares(history)[-window:])
    forecast = []
    for _ in range(horizon):
        forecast.append(np.mean(kept, axis=0))
        kept = [*kept[1:], forecast[-1]]
    return np.array(forecast).reshape(horizon, -1)


def exponential_average(history: Load, horizon: int, decay: float = 0.99) -> np.ndarray:
    """A mean in which a step weighs `decay` times the one after it: what EPLB is usually fed with.

    Shapes: history `[steps, experts]` -> `[horizon, experts]`.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must be at least 0 and below 1")
    shares = load_shares(history)
    weight = decay ** np.arange(len(shares))[::-1]
    return np.repeat((weight @ shares / weight.sum())[None], horizon, axis=0)


def autoregression(history: Load, horizon: int, order: int = 5) -> np.ndarray:
    """Each expert's change as a linear function of its last `order` changes, fitted by least squares.

        d[t] = sum_i a_i d[t - i],   d = differences of shares      the AR part of ARIMA, Cong et al. 2024

    For loads that still drift. One that would explode is damped: forecasts are kept between 0 and 1 and sum to 1.

    Shapes: history `[steps, experts]` -> `[horizon, experts]`.
    """
    return arima(history, horizon, order, errors=0)


PREDICTORS: dict[str, Predictor] = {
    "last": last,
    "sliding-average": sliding_average,
    "exponential-average": exponential_average,
    "autoregression": autoregression,
    "arima": arima,
    "lstm": lstm,
}
LEAST_STEPS = {"autoregression": 11, "arima": 26, "lstm": 20}  # of a history; the others need one


def is_stable(history: Load, window: int = 100, most: float = 0.02) -> bool:
    """Whether loads have left their first, transient state, so that a placement may be decided rarely.

    No share ranged over more than `most` in the last `window` steps, and the means of their two halves lie within a
    quarter of that. Cong et al. 2024 look at windows of 10 and 100 steps by eye; the thresholds are ours. A history
    shorter than the window is not stable.
    """
    shares = load_shares(history)
    if len(shares) < window:
        return False
    recent = shares[-window:]
    drift = np.abs(recent[window // 2 :].mean(0) - recent[: window // 2].mean(0))
    return bool((np.ptp(recent, axis=0) < most).all() and (drift < most / 4).all())


def forecast_error(forecast: Load, actual: Load, relative: bool = True) -> float:
    """The mean deviation of the experts' mean shares over the horizon, relative to the actual ones or not.

    Cong et al. 2024. Experts without a token count in the absolute error only.
    """
    ours, theirs = load_shares(forecast).mean(0), load_shares(actual).mean(0)
    if not relative:
        return float(np.abs(ours - theirs).mean())
    used = theirs > 0
    return float((np.abs(ours - theirs)[used] / theirs[used]).mean())
