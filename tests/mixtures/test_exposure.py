"""Counts over spans of different length: Poisson experts with an exposure."""

import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.stats import poisson
from sklearn.linear_model import PoissonRegressor
from sklearn.metrics import mean_poisson_deviance

from moestro.mixtures import MixtureOfExpertsRegressor
from moestro.mixtures.experts import PoissonExpert


def counted(seed, n=2000):
    """Log-rates 0.5 + x and 2 - 0.8x, gate logit 3x for the first, each row watched for 0.2 to 5 units."""
    rng = np.random.default_rng(seed)
    x, span = rng.uniform(-1, 1, n), np.exp(rng.uniform(np.log(0.2), np.log(5), n))
    first = rng.random(n) < 1 / (1 + np.exp(-3 * x))
    return np.column_stack([span, x]), rng.poisson(span * np.exp(np.where(first, 0.5 + x, 2 - 0.8 * x))).astype(
        float
    )


def test_poisson_experts_one_with_an_exposure_is_the_regression_of_rates():
    x, y = counted(0, n=300)
    fitted = MixtureOfExpertsRegressor(1, expert=PoissonExpert(exposure=0), tol=1e-12).fit(x, y)
    rates = PoissonRegressor(alpha=0, tol=1e-10, max_iter=1000).fit(x[:, 1:], y / x[:, 0], sample_weight=x[:, 0])
    np.testing.assert_allclose(fitted.expert_coef_.ravel(), rates.coef_, rtol=1e-5)
    np.testing.assert_allclose(fitted.expert_intercept_.ravel(), rates.intercept_, rtol=1e-5)
    np.testing.assert_allclose(fitted.predict(x), x[:, 0] * rates.predict(x[:, 1:]), rtol=1e-5)


def test_poisson_experts_with_an_exposure_are_recovered_and_their_gate_does_not_see_it():
    x, y = counted(0)
    fitted = MixtureOfExpertsRegressor(2, expert=PoissonExpert(exposure=0), random_state=0).fit(x, y)
    fitted = fitted.sort_experts("coef:0")
    assert fitted.gate_coef_.shape == (2, 1)
    assert fitted.n_parameters_ == 6
    lines = np.column_stack([fitted.expert_intercept_, fitted.expert_coef_[:, 0]])
    np.testing.assert_allclose(lines, [[2, -0.8], [0.5, 1]], atol=0.1)
    twice = x * [2, 1]
    np.testing.assert_allclose(fitted.predict(twice), 2 * fitted.predict(x))
    np.testing.assert_array_equal(fitted.gate_proba(twice), fitted.gate_proba(x))


def test_poisson_experts_with_an_exposure_have_the_density_they_claim():
    x, y = counted(1, n=200)
    fitted = MixtureOfExpertsRegressor(2, expert=PoissonExpert(exposure=0), random_state=0, tol=1e-4).fit(x, y)
    log_rate = fitted.expert_intercept_[:, 0] + x[:, 1:] @ fitted.expert_coef_[:, 0].T
    by_expert = poisson(x[:, [0]] * np.exp(log_rate)).pmf(y[:, None])
    np.testing.assert_allclose(fitted.predict_density(x, y), (fitted.gate_proba(x) * by_expert).sum(1), rtol=1e-9)


def test_poisson_experts_with_an_exposure_give_the_slope_of_their_likelihood():
    x, y = counted(2, n=60)
    model = MixtureOfExpertsRegressor(2, expert=PoissonExpert(alpha=0.1, exposure=0), random_state=0, tol=1e-2)
    fitted = model.fit(x, y)
    rows, mixture = fitted._rows_of(x, y, None), fitted.mixture_
    here = mixture.free() + 0.1

    def value(numbers):
        return mixture.restore(numbers).objective(rows)

    def slope(numbers):
        return mixture.restore(numbers).gradient(rows)

    assert check_grad(value, slope, here) < 1e-4 * np.abs(slope(here)).max()


def test_poisson_experts_explain_a_part_of_their_deviance():
    x, y = counted(3, n=200)
    fitted = MixtureOfExpertsRegressor(2, expert=PoissonExpert(exposure=0), random_state=0, tol=1e-4).fit(x, y)
    whole = mean_poisson_deviance(y, np.full(len(y), y.mean()))
    explained = 1 - mean_poisson_deviance(y, fitted.predict(x)) / whole
    np.testing.assert_allclose(fitted.d2_score(x, y), explained)
    linear = MixtureOfExpertsRegressor(2, random_state=0, tol=1e-4).fit(x, y)
    np.testing.assert_allclose(linear.d2_score(x, y), linear.score(x, y))


@pytest.mark.parametrize(
    ("exposure", "columns", "message"),
    [(2, 2, "no column of X; pass one of 0 to 1"), (0, 1, "only the column of the exposure"), (1, 2, "above 0")],
)
def test_poisson_experts_refuse_a_wrong_exposure(exposure, columns, message):
    x, y = counted(0, n=30)
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsRegressor(2, expert=PoissonExpert(exposure=exposure)).fit(x[:, :columns], y)


def test_poisson_experts_refuse_a_later_exposure_of_zero_and_a_layer():
    pytest.importorskip("torch")
    x, y = counted(0, n=100)
    fitted = MixtureOfExpertsRegressor(2, expert=PoissonExpert(exposure=0), random_state=0, tol=1e-2).fit(x, y)
    with pytest.raises(ValueError, match="above 0"):
        fitted.predict(x * [0, 1])
    with pytest.raises(ValueError, match="a layer of gate and experts cannot"):
        fitted.to_moe()
