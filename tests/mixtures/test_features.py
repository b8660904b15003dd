"""A gate that reads some columns, and experts that read others."""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import check_estimator

from moestro.mixtures import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from moestro.mixtures.experts import BinomialExpert, PoissonExpert
from moestro.mixtures.gates import GATES


def two_columns(seed, n=600):
    """The first column chooses between the lines 1 + 2x and -1 - x in the second, with deviations 0.3 and 0.5."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 2)) * [2.0, 3.0] + [5.0, -1.0]
    first = rng.random(n) < expit(1.5 * (x[:, 0] - 5))
    noise = rng.standard_normal(n) * np.where(first, 0.3, 0.5)
    return x, np.where(first, 1 + 2 * x[:, 1], -1 - x[:, 1]) + noise


def log_likelihood(theta, x, y):
    """Of a logit in column 0 and two lines in column 1, written out."""
    (a, b), lines, deviation = theta[:2], theta[2:6].reshape(2, 2), np.exp(theta[6:])
    share = expit(a + b * x[:, 0])
    each = [stats.norm.pdf(y, line[0] + line[1] * x[:, 1], s) for line, s in zip(lines, deviation, strict=True)]
    return np.log(share * each[0] + (1 - share) * each[1]).sum()


def split(**options):
    options = {"gate_features": [0], "expert_features": [1], "random_state": 0, "tol": 1e-10} | options
    return MixtureOfExpertsRegressor(2, **options)


def test_the_likelihood_is_that_of_the_formula_and_no_search_climbs_higher():
    x, y = two_columns(0)
    fitted = split().fit(x, y).sort_experts("coef:1")
    gate, intercept = fitted.gate_coef_[0] - fitted.gate_coef_[1], fitted.gate_intercept_
    lines = np.column_stack([fitted.expert_intercept_[:, 0], fitted.expert_coef_[:, 0, 1]])
    spread = 0.5 * np.log(fitted.expert_variance_[:, 0])
    theta = np.concatenate([[intercept[0] - intercept[1], gate[0]], lines.ravel(), spread])
    assert fitted.loglik_ == pytest.approx(log_likelihood(theta, x, y), rel=1e-9)
    climbed = minimize(lambda free: -log_likelihood(free, x, y), theta, method="BFGS")
    assert -climbed.fun - fitted.loglik_ < 1e-4
    assert fitted.n_parameters_ == 2 + 4 + 2


def test_columns_that_are_not_read_have_slope_zero_and_no_influence():
    x, y = two_columns(1)
    fitted = split().fit(x, y)
    assert (fitted.gate_coef_[:, 1] == 0).all()
    assert (fitted.expert_coef_[:, :, 0] == 0).all()
    moved = x + np.array([0.0, 7.0])
    np.testing.assert_array_equal(fitted.gate_proba(moved), fitted.gate_proba(x))
    np.testing.assert_array_equal(fitted.predict_experts(x + np.array([7.0, 0.0])), fitted.predict_experts(x))
    assert np.abs(fitted.predict(moved) - fitted.predict(x)).max() > 1
    errors = fitted.standard_errors(x, y)
    assert (errors["gate_coef_"][:, 1] == 0).all()
    assert 0 < errors["expert_coef_"][0, 0, 1] < 0.1


def test_it_is_the_fit_of_all_columns_where_both_sides_read_all():
    x, y = two_columns(2, n=200)
    one = split(gate_features=[0, 1], expert_features=[0, 1], tol=1e-6).fit(x, y)
    other = MixtureOfExpertsRegressor(2, random_state=0).fit(x, y)
    np.testing.assert_array_equal(one.predict(x), other.predict(x))
    np.testing.assert_array_equal(one.gate_coef_, other.gate_coef_)


def test_one_number_is_one_column():
    x, y = two_columns(3, n=200)
    np.testing.assert_array_equal(
        split(gate_features=0, expert_features=1).fit(x, y).predict(x), split().fit(x, y).predict(x)
    )


def test_names_are_columns():
    x, y = two_columns(3, n=200)
    frame = pd.DataFrame(x, columns=["dose", "age"])
    named = split(gate_features="dose", expert_features=["age"]).fit(frame, y)
    np.testing.assert_array_equal(named.predict(frame), split().fit(x, y).predict(x))


@pytest.mark.parametrize("gate", list(GATES))
def test_every_gate_can_read_one_column(gate):
    x, y = two_columns(4, n=150)
    fitted = split(gate=gate, n_init=1, tol=1e-4).fit(x, y)
    np.testing.assert_array_equal(fitted.gate_proba(x + np.array([0.0, 7.0])), fitted.gate_proba(x))
    assert np.isfinite(fitted.log_prob(x, y)).all()


def test_densities_of_some_columns_are_densities_of_those_alone():
    x, y = two_columns(5)
    fitted = split(gate="gaussian").fit(x, y)
    assert fitted.gate_means_.shape == (2, 1)
    grid = np.column_stack([np.linspace(-15, 25, 4001), np.zeros(4001)])
    area = np.trapezoid(np.exp(fitted.score_samples(grid)), grid[:, 0])
    assert area == pytest.approx(1, abs=1e-6)


def test_experts_without_features_keep_an_intercept():
    x, y = two_columns(6)
    fitted = split(expert="poisson", expert_features=[]).fit(x, np.abs(y).round())
    assert (fitted.expert_coef_ == 0).all()
    assert fitted.n_parameters_ == 2 + 2


def test_classes():
    x, y = two_columns(7)
    fitted = MixtureOfExpertsClassifier(2, gate_features=[0], expert_features=[1], random_state=0).fit(x, y > 0)
    whole = MixtureOfExpertsClassifier(1).fit(x, y > 0)
    assert fitted.score(x, y > 0) > whole.score(x, y > 0) + 0.15
    assert (fitted.gate_coef_[:, 1] == 0).all()


def test_exposure_and_trials_are_no_features():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.integers(5, 20, 300), rng.standard_normal((300, 2))]).astype(float)
    y = rng.binomial(x[:, 0].astype(int), expit(x[:, 2]))
    for expert in (PoissonExpert(exposure=0), BinomialExpert(trials=0)):
        fitted = split(expert=expert, gate_features=[1], expert_features=[2], tol=1e-4).fit(x, y)
        assert fitted.gate_coef_.shape == (2, 2)
        assert (fitted.gate_coef_[:, 1] == 0).all()
        with pytest.raises(ValueError, match=r"gate_features=\[0\]: 0 is no feature .* pass some of 1, 2"):
            split(expert=expert, gate_features=[0]).fit(x, y)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"gate_features": [2]}, r"gate_features=\[2\]: 2 is no feature to read; pass some of 0, 1"),
        ({"gate_features": [True, False]}, r"True is no feature to read"),
        ({"gate_features": [0.5]}, r"0.5 is no feature to read"),
        ({"expert_features": "age"}, r"expert_features='age': 'age' is no feature"),
        ({"expert_features": [1, 1]}, r"expert_features=\[1, 1\] must name each feature once"),
        ({"gate_features": []}, r"pass gate='constant'"),
    ],
)
def test_columns_that_are_not_there_are_refused(choice, message):
    x, y = two_columns(8, n=50)
    with pytest.raises(ValueError, match=message):
        split(**choice).fit(x, y)


def test_warm_start_refuses_other_columns():
    x, y = two_columns(9, n=100)
    fitted = split(warm_start=True, tol=1e-4).fit(x, y)
    before = fitted.predict(x)
    with pytest.raises(ValueError, match="warm_start=True needs the gate, expert, features"):
        fitted.set_params(gate_features=[1]).fit(x, y)
    np.testing.assert_array_equal(fitted.predict(x), before)


def test_scikit_learn_finds_no_fault_in_chosen_columns():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        check_estimator(split(n_init=1, max_iter=20, expert_features=None), on_skip=None)
