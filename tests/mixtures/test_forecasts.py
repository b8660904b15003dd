"""Forecasters weighted by their record."""

import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

from moestro.mixtures import ForecastAggregator


def panel(seed, deviations, biases, n=4000):
    rng = np.random.default_rng(seed)
    outcome = 10 * rng.standard_normal(n)
    noise = rng.standard_normal((n, len(deviations))) * deviations
    return outcome[:, None] + np.asarray(biases) + noise, outcome


def test_forecaster_aggregation_alike_forecasters_are_averaged():
    forecasts, outcome = panel(0, [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], n=50)
    alike = outcome[:, None] + np.stack([np.roll(np.tile([1.0, -1.0], 25), k) for k in range(3)], axis=1)
    fitted = ForecastAggregator(bias=False).fit(alike, outcome)
    np.testing.assert_allclose(fitted.weights_, 1 / 3)
    np.testing.assert_allclose(fitted.predict(forecasts), forecasts.mean(1))
    equal = ForecastAggregator(bias=False, weighting="equal").fit(forecasts, outcome)
    np.testing.assert_allclose(equal.predict(forecasts), forecasts.mean(1))
    assert abs(equal.differentiation_) < 1e-12


def test_forecaster_aggregation_variances_one_and_four():
    forecasts, outcome = panel(0, [1.0, 2.0], [0.0, 0.0], n=40000)
    fitted = ForecastAggregator().fit(forecasts, outcome)
    np.testing.assert_allclose(fitted.weights_, [0.8, 0.2], atol=0.01)
    np.testing.assert_allclose(np.mean((fitted.predict(forecasts) - outcome) ** 2), 0.8, rtol=0.03)
    np.testing.assert_allclose(fitted.differentiation_, 1 - 0.8 / 1.25, atol=0.02)


def test_forecaster_aggregation_a_constant_bias_goes():
    outcome = np.random.default_rng(0).standard_normal(100)
    fitted = ForecastAggregator(shrinkage=0.0).fit(np.column_stack([outcome + 3, outcome - 2]), outcome)
    np.testing.assert_allclose(fitted.bias_, [3.0, -2.0])
    np.testing.assert_allclose(fitted.predict([[5.0, 0.0]]), [2.0])
    np.testing.assert_allclose(fitted.bias_gain_, 1.0)


def test_forecaster_aggregation_one_forecaster_is_debiased():
    forecasts, outcome = panel(1, [0.5], [2.0], n=200)
    fitted = ForecastAggregator(shrinkage=0.0).fit(forecasts, outcome)
    np.testing.assert_allclose(fitted.predict(forecasts), forecasts[:, 0] - (forecasts[:, 0] - outcome).mean())


@pytest.mark.parametrize("weighting", ["precision", "covariance", "equal"])
def test_forecaster_aggregation_the_silent_are_left_out(weighting):
    forecasts, outcome = panel(2, [1.0, 2.0, 0.5], [0.0, 1.0, -1.0], n=300)
    fitted = ForecastAggregator(weighting=weighting).fit(forecasts, outcome)
    partly = forecasts[:5].copy()
    partly[0, 0] = partly[1, 1:] = partly[2] = np.nan
    found = fitted.predict(partly)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[3:], fitted.predict(forecasts[3:5]))
    np.testing.assert_allclose(found[1], partly[1, 0] - fitted.bias_[0])
    np.testing.assert_allclose(found[2], outcome.mean())
    if weighting == "precision":
        share = 1 / fitted.variance_[1:]
        expected = share @ (partly[0, 1:] - fitted.bias_[1:]) / share.sum()
        np.testing.assert_allclose(found[0], expected)


def test_forecaster_aggregation_shared_errors_count_once():
    rng = np.random.default_rng(0)
    outcome, shared = rng.standard_normal((2, 5000))
    forecasts = outcome[:, None] + np.column_stack([shared, shared + 0.01 * rng.standard_normal(5000)])
    forecasts = np.column_stack([forecasts, outcome + rng.standard_normal(5000)])
    loss = {
        weighting: np.mean(
            (ForecastAggregator(weighting=weighting).fit(forecasts, outcome).predict(forecasts) - outcome) ** 2
        )
        for weighting in ("precision", "covariance")
    }
    assert loss["covariance"] < 0.52 < 0.54 < loss["precision"]


def test_parts_of_the_past_are_the_whole_past():
    forecasts, outcome = panel(3, [1.0, 2.0], [0.5, 0.0], n=100)
    forecasts[::7, 1] = np.nan
    whole = ForecastAggregator().fit(forecasts, outcome)
    parts = ForecastAggregator().partial_fit(forecasts[:40], outcome[:40]).partial_fit(forecasts[40:], outcome[40:])
    np.testing.assert_allclose(parts.weights_, whole.weights_)
    np.testing.assert_allclose(parts.bias_, whole.bias_)


def test_skill_learned_from_the_past_beats_the_consensus_on_the_future():
    forecasts, outcome = panel(4, [0.5, 1.0, 2.0, 3.0], [1.0, -1.0, 0.5, 2.0], n=600)
    model, errors = ForecastAggregator(), []
    for at in range(100, 600, 50):
        model = clone(model).fit(forecasts[:at], outcome[:at])
        errors.append((model.predict(forecasts[at : at + 50]) - outcome[at : at + 50]) ** 2)
    consensus = (forecasts[100:].mean(1) - outcome[100:]) ** 2
    assert np.mean(errors) < 0.5 * consensus.mean()


@pytest.mark.parametrize(
    ("options", "message"), [({"weighting": "skill"}, "is unknown"), ({"shrinkage": -1.0}, "at least 0")]
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ForecastAggregator(**options).fit(np.ones((3, 2)), np.ones(3))


def test_forecaster_aggregation_scikit_learn_finds_no_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(ForecastAggregator(), on_fail=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"] == []
