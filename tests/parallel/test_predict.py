"""Forecasts of loads: exact where theory says so, and what their errors cost a placement."""

import numpy as np
import pytest
from oracles.entry import entry

from moestro.parallel import PREDICTORS, Cluster, policy_gains
from moestro.parallel.predict import autoregression, exponential_average, forecast_error, is_stable, sliding_average


def counts(p, tokens, steps, seed=0):
    return np.random.default_rng(seed).multinomial(tokens, p, steps)


@entry("load-predict")
def test_the_error_of_the_average_of_steady_loads_is_that_of_counting(method):
    p, tokens, window = np.array([0.4, 0.3, 0.2, 0.1]), 64, 20
    errors = [sliding_average(counts(p, tokens, window, seed), 5, window).mean(0) / p - 1 for seed in range(400)]
    spread = np.sqrt(np.mean(np.square(errors), axis=0))
    assert spread == pytest.approx(np.sqrt((1 - p) / (p * tokens * window)), rel=0.12)


@entry("load-predict")
def test_forecasts_enter_the_window(method):
    history = [[1.0, 3.0], [3.0, 1.0]]
    forecast = sliding_average(history, 3, window=2)
    assert forecast[:, 0] == pytest.approx([1 / 2, (3 / 4 + 1 / 2) / 2, ((3 / 4 + 1 / 2) / 2 + 1 / 2) / 2])
    assert forecast.sum(1) == pytest.approx(1)


@entry("load-predict")
def test_steady_loads_need_no_more_than_an_average(method):
    p = np.array([0.4, 0.3, 0.2, 0.1])
    history, later = np.split(counts(p, 500, 400), 2)
    errors = {name: forecast_error(predict(history, 200), later) for name, predict in PREDICTORS.items()}
    assert errors["sliding-average"] < 0.01
    assert errors["sliding-average"] < min(errors["last"], errors["autoregression"])


def drifting(steps):
    """One expert's load falls off and levels out, as in the transient state."""
    hot = 0.2 + 0.5 * np.exp(-np.arange(steps) / 40)
    return np.stack([hot, *[(1 - hot) / 3] * 3], axis=1)


@entry("load-predict")
def test_transient_loads_are_told_from_stable_ones(method):
    loads = drifting(400)
    assert not is_stable(loads[:60])
    assert not is_stable(loads[:120])
    assert is_stable(loads)
    assert is_stable(counts([0.25] * 4, 100_000, 150))
    assert not is_stable(loads[-50:])  # too short to tell


@entry("load-predict")
def test_while_loads_drift_autoregression_sees_further(method):
    loads = drifting(300)
    history, later = loads[:60], loads[60:100]
    ours = forecast_error(autoregression(history, 40, order=1), later)
    assert ours < 0.01 < forecast_error(sliding_average(history, 40, 50), later)
    wild = autoregression(np.random.default_rng(0).random((60, 4)), 500)
    assert np.isfinite(wild).all()
    assert wild.sum(1) == pytest.approx(1)


@entry("load-predict")
def test_a_stable_forecast_costs_the_placement_less_than_two_per_cent(method):
    p = np.random.default_rng(3).dirichlet(np.full(16, 0.5))
    gains = policy_gains(counts(p, 4096, 60), Cluster(4, slots=24))
    for gain in gains:
        if gain.policy != "anti-correlation":
            assert gain.hindsight - gain.balancedness < 0.02, gain.policy


def test_an_exponential_average_forgets():
    assert exponential_average([[1, 0], [0, 1]], 2, decay=0.5)[0] == pytest.approx([1 / 3, 2 / 3])
    assert exponential_average([[1, 0], [0, 1]], 1, decay=0)[0] == pytest.approx([0, 1])


def test_errors_by_hand():
    assert forecast_error([[0.5, 0.5]], [[0.4, 0.6]]) == pytest.approx((0.1 / 0.4 + 0.1 / 0.6) / 2)
    assert forecast_error([[0.5, 0.5]], [[1.0, 0.0]], relative=False) == 0.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sliding_average([[1.0]], 1, window=0), "at least 1"),
        (lambda: exponential_average([[1.0]], 1, decay=1.0), "below 1"),
        (lambda: autoregression([[1.0]] * 5, 1), "pass at least 11"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
