"""Skew experts: their limits, their moments, their data."""

import numpy as np
import pytest
from oracles.planted_mixtures import split_noise
from scipy import stats

from moestro.mixtures import MixtureOfExpertsRegressor
from moestro.mixtures.experts import SkewNormalExpert, SkewTExpert, StudentExpert
from moestro.mixtures.experts.skew import log_t_cdf

D = np.linspace(-6, 6, 25)[:, None]


def params(skew, dof=None):
    found = {"coef": np.zeros((1, 1, 1)), "scale": np.ones(1), "delta": np.array([skew / np.sqrt(1 + skew**2)])}
    return found if dof is None else {**found, "dof": np.array([dof])}


def log_density(expert, skew, dof=None):
    return expert.log_prob(params(skew, dof), np.ones((25, 1)), D)[:, 0]


def test_skew_normal_experts_are_scipys():
    np.testing.assert_allclose(
        log_density(SkewNormalExpert(), 3.0), stats.skewnorm(3.0).logpdf(D[:, 0]), atol=1e-10
    )
    np.testing.assert_allclose(log_density(SkewNormalExpert(), 0.0), stats.norm.logpdf(D[:, 0]), atol=1e-12)


def test_skew_t_experts_limits():
    np.testing.assert_allclose(log_density(SkewTExpert(), 0.0, 4.0), stats.t(4).logpdf(D[:, 0]), atol=1e-12)
    many = log_density(SkewTExpert(), 3.0, 1e9)
    np.testing.assert_allclose(many[8:], stats.skewnorm(3.0).logpdf(D[8:, 0]), atol=1e-5)
    plain = {"coef": np.zeros((1, 1, 1)), "covariance": np.ones((1, 1, 1)), "dof": np.array([4.0])}
    student = StudentExpert().log_prob(plain, np.ones((25, 1)), D)[:, 0]
    np.testing.assert_allclose(log_density(SkewTExpert(), 0.0, 4.0), student, atol=1e-12)


@pytest.mark.parametrize(("expert", "dof"), [(SkewNormalExpert(), None), (SkewTExpert(), 5.0)])
def test_skew_experts_e_step_agrees_with_quadrature(expert, dof):
    delta, y = params(3.0)["delta"][0], 0.7
    nodes, at_nodes = np.polynomial.legendre.leggauss(300)
    u, by_u = 7.5 * (nodes + 1), 7.5 * at_nodes  # |U| from 0 to 15
    if dof is None:
        w, by_w = np.ones((1, 1)), np.ones((1, 1))
    else:  # the gamma weight from 0 to 9
        w = 4.5 * (nodes + 1)[:, None]
        by_w = 4.5 * at_nodes[:, None] * stats.gamma(dof / 2, scale=2 / dof).pdf(w)
    half = stats.halfnorm(scale=w**-0.5).pdf(u)
    mass = by_u * by_w * half * stats.norm(delta * u, ((1 - delta**2) / w) ** 0.5).pdf(y)
    total = mass.sum()
    wanted = [(mass * value).sum() / total for value in (w, w * u, w * u * u)]
    found = expert._moments(params(3.0, dof), np.array([[y]]))
    np.testing.assert_allclose([value[0, 0] for value in found], wanted, rtol=1e-4)
    np.testing.assert_allclose(
        np.exp(expert.log_prob(params(3.0, dof), np.ones((1, 1)), [[y]]))[0, 0], total, rtol=1e-4
    )


def test_skew_normal_experts_one_is_the_most_likely_skew_normal():
    y = stats.skewnorm(4.0, 2.0, 3.0).rvs(500, random_state=0)
    fitted = MixtureOfExpertsRegressor(1, expert="skew-normal", tol=1e-10, max_iter=5000).fit(np.zeros((500, 1)), y)
    best = stats.skewnorm(*stats.skewnorm.fit(y)).logpdf(y).sum()
    assert fitted.loglik_ > best - 1e-3


def test_skew_normal_experts_find_the_skewness():
    x, y = split_noise("skew-normal", 0)
    fitted = MixtureOfExpertsRegressor(2, expert="skew-normal", random_state=0).fit(x, y).sort_experts("coef:0")
    normal = MixtureOfExpertsRegressor(2, random_state=0).fit(x, y)
    assert fitted.loglik_ > normal.loglik_ + 20
    assert (fitted.expert_skew_ > [1.5, 2.5]).all()
    assert (fitted.expert_skew_ < [6, 10]).all()
    assert np.abs(fitted.expert_coef_[:, 0, 0] - [-2.5, 2.5]).max() < 0.4


@pytest.mark.nightly
def test_skew_t_experts_find_the_means():
    x, y = split_noise("skew-t", 0)
    fitted = MixtureOfExpertsRegressor(2, expert="skew-t", random_state=0).fit(x, y).sort_experts("coef:0")
    assert np.abs(fitted.expert_coef_[:, 0, 0] - [-2.5, 2.5]).max() < 0.25


def test_skew_t_experts_with_fixed_degrees():
    x, y = split_noise("skew-t", 1, n=150)
    fitted = MixtureOfExpertsRegressor(2, expert=SkewTExpert(dof=6.0), random_state=0, n_init=1, tol=1e-3).fit(x, y)
    assert fitted.n_parameters_ == 10
    np.testing.assert_array_equal(fitted.expert_dof_, 6.0)


def test_the_log_distribution_of_t_survives_its_tail():
    np.testing.assert_allclose(log_t_cdf(np.array([3.0]), np.array([-2.0])), stats.t(3).logcdf(-2.0))
    far = log_t_cdf(np.array([200.0]), np.array([-1e3]))
    assert np.isfinite(far).all()
    np.testing.assert_allclose(
        log_t_cdf(np.array([3.0]), np.array([-1e100])), -300 * np.log(10) + np.log(1.102658), rtol=1e-3
    )
