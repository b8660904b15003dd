"""Forecasts of loads: exact where theory says so, and what their errors cost a placement."""

import numpy as np
import pytest
import torch
from oracles.entry import entry
from scipy.optimize import least_squares

from moestro.parallel import PREDICTORS, Cluster, policy_gains
from moestro.parallel.arima import arima, fit, least_steps
from moestro.parallel.lstm import lstm
from moestro.parallel.predict import (
    LEAST_STEPS,
    autoregression,
    exponential_average,
    forecast_error,
    is_stable,
    sliding_average,
)


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
    p, errors = np.array([0.4, 0.3, 0.2, 0.1]), dict.fromkeys(PREDICTORS, 0.0)
    for seed in range(2):
        history, later = np.split(counts(p, 500, 160, seed), 2)
        for name, predict in PREDICTORS.items():
            errors[name] += forecast_error(predict(history, 80), later) / 2
    assert errors["sliding-average"] < 0.02
    others = errors.keys() - {"sliding-average", "exponential-average"}
    assert errors["sliding-average"] < min(errors[name] for name in others), errors


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


def moving(coefficients, order, steps, seed=0):
    """Changes of an ARMA process with unit noise, two experts."""
    noise = np.random.default_rng(seed).normal(size=(steps + 50, 2))
    change = noise.copy()
    for t in range(len(coefficients), steps + 50):
        for lag, a in enumerate(coefficients[:order], 1):
            change[t] += a * change[t - lag]
        for lag, b in enumerate(coefficients[order:], 1):
            change[t] += b * noise[t - lag]
    return change[50:]


@entry("load-predict")
@pytest.mark.parametrize(("coefficients", "order"), [((-0.7,), 0), ((0.6,), 1), ((0.5, 0.4), 1)])
def test_the_coefficients_of_a_known_process_are_found(method, coefficients, order):
    found, error = fit(moving(coefficients, order, 2000), order, len(coefficients) - order)
    assert pytest.approx(np.array([coefficients] * 2), abs=0.06) == found.T
    assert (error**2).mean() == pytest.approx(1, rel=0.06)  # the noise is what is left


def squares(coefficients, change, order):
    """The sum that is minimised, one step after the other."""
    error = np.zeros(len(change))
    for t in range(order, len(change)):
        error[t] = change[t] - sum(a * change[t - 1 - i] for i, a in enumerate(coefficients[:order]))
        error[t] -= sum(b * error[t - 1 - j] for j, b in enumerate(coefficients[order:]) if t - 1 - j >= 0)
    return error[order:]


@entry("load-predict")
def test_the_fit_is_the_one_that_a_general_solver_finds(method):
    change = moving((0.5, 0.4), 1, 120, seed=4)
    found, error = fit(change, 1, 1)
    for expert in range(2):
        best = least_squares(squares, [0.0, 0.0], args=(change[:, expert], 1), xtol=1e-12, ftol=1e-12, gtol=1e-12)
        assert found[:, expert] == pytest.approx(best.x, abs=1e-4)
        assert error[1:, expert] == pytest.approx(squares(found[:, expert], change[:, expert], 1))


@entry("load-predict")
def test_with_one_error_and_no_change_it_is_exponential_smoothing(method):
    """ARIMA(0, 1, 1) forecasts, for ever, the average in which a step weighs -b times the one after it."""
    history = counts([0.5, 0.5], 40, 150)
    (b,), _ = fit(np.diff(history / 40, axis=0), 0, 1)
    assert (b < -0.7).all()
    level = history[0] / 40
    for share in history[1:] / 40:
        level = -b * level + (1 + b) * share
    assert arima(history, 3, order=0, errors=1) == pytest.approx(np.array([level] * 3), abs=1e-9)


@entry("load-predict")
def test_arima_without_errors_is_autoregression(method):
    history = counts([0.5, 0.3, 0.2], 100, 60)
    assert arima(history, 9, order=3, errors=0) == pytest.approx(autoregression(history, 9, order=3))
    assert arima([[1.0, 3.0]] * 40, 4) == pytest.approx(np.array([[0.25, 0.75]] * 4))


def in_turn(steps):
    """Three experts take turns at being hot: nothing that an average could see."""
    return 1.0 + 7.0 * np.eye(3)[np.arange(steps) % 3]


@entry("load-predict")
@pytest.mark.parametrize("predict", [lstm, arima])
def test_loads_that_take_turns_are_foreseen_step_by_step(method, predict):
    history, later = np.split(in_turn(75), [63])
    wanted = later / later.sum(1, keepdims=True)
    error = np.abs(predict(history, 12) - wanted).max()
    assert error < 0.1 < np.abs(sliding_average(history, 12, 30) - wanted).max()


@entry("load-predict")
def test_an_lstm_forecast_depends_on_history_and_seed_alone(method):
    torch.manual_seed(1)
    before, history = torch.get_rng_state(), counts([0.6, 0.4], 50, 30)
    first = lstm(history, 3, epochs=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    with torch.no_grad():
        assert (lstm(history, 3, epochs=3) == first).all()
    assert (lstm(history, 3, epochs=3, seed=1) != first).any()
    assert first.sum(1) == pytest.approx(1)


def test_every_predictor_says_how_many_steps_it_needs():
    chance = np.random.default_rng(0)
    assert LEAST_STEPS["arima"] == least_steps(5, 5)
    for name, predict in PREDICTORS.items():
        least = LEAST_STEPS.get(name, 1)
        assert predict(chance.random((least, 2)), 2).shape == (2, 2), name
        if least > 1:
            with pytest.raises(ValueError, match=f"pass at least {least}"):
                predict(chance.random((least - 1, 2)), 2)


@entry("load-predict")
def test_a_stable_forecast_costs_the_placement_less_than_two_per_cent(method):
    p = np.random.default_rng(3).dirichlet(np.full(16, 0.5))
    for predictor in ("sliding-average", "lstm"):
        for gain in policy_gains(counts(p, 4096, 60), Cluster(4, slots=24), predictor=predictor):
            if gain.policy != "anti-correlation":
                assert gain.hindsight - gain.balancedness < 0.02, (gain.policy, predictor)


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
