"""Committees of Gaussian processes."""

import warnings

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.utils.estimator_checks import check_estimator

from moestro.mixtures import DistributedGPRegressor
from moestro.mixtures.gp import AGGREGATIONS, committee

rng = np.random.default_rng(0)
X = rng.uniform(-3, 3, (150, 1))
Y = np.sin(2 * X[:, 0]) + 0.1 * rng.standard_normal(150)
FAR = np.array([[1e4]])


def as_given(**options):
    return DistributedGPRegressor(
        ConstantKernel(2.0) * RBF(0.7), noise=0.05, optimize=False, normalize_y=False, random_state=0, **options
    ).fit(X, Y)


@pytest.mark.parametrize(
    ("aggregation", "mean", "variance"),
    [
        ("poe", 2.333333, 0.166667),
        ("gpoe", 2.333333, 0.333333),
        ("bcm", 2.8, 0.2),
        ("rbcm", 2.630144, 0.291884),
    ],
)
def test_distributed_gps_numeric_case(aggregation, mean, variance):
    found = committee(np.array([[1.0], [3.0]]), np.array([[0.5], [0.25]]), np.array([1.0]), aggregation)
    np.testing.assert_allclose([found[0][0], found[1][0]], [mean, variance], atol=1e-6)


@pytest.mark.parametrize("aggregation", ["poe", "gpoe", "bcm"])
def test_distributed_gps_one_expert_is_the_exact_process(aggregation):
    exact = GaussianProcessRegressor(ConstantKernel(2.0) * RBF(0.7), alpha=0.05, optimizer=None).fit(X, Y)
    grid = np.linspace(-4, 4, 30)[:, None]
    mean, std = as_given(n_experts=1, aggregation=aggregation).predict(grid, return_std=True)
    expected = exact.predict(grid, return_std=True)
    np.testing.assert_allclose(mean, expected[0], atol=1e-6)
    np.testing.assert_allclose(std, np.sqrt(expected[1] ** 2 + 0.05), atol=1e-6)


def test_distributed_gps_one_robust_expert_is_tempered_by_the_entropy_gained():
    model = as_given(n_experts=1, aggregation="rbcm")
    mean, variance = model.predict_experts(X)
    power = 0.5 * (np.log(2.0) - np.log(variance[0]))
    precision = power / variance[0] + (1 - power) / 2.0
    found, std = model.predict(X, return_std=True)
    np.testing.assert_allclose(found, power * mean[0, :, 0] / variance[0] / precision, atol=1e-10)
    np.testing.assert_allclose(std**2 - 0.05, 1 / precision, atol=1e-10)
    assert np.abs(std**2 - 0.05 - variance[0]).max() > 1e-3  # so one robust expert is not the exact process


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_distributed_gps_far_from_the_data(aggregation):
    mean, std = as_given(n_experts=3, aggregation=aggregation).predict(FAR, return_std=True)
    expected = 2.0 / 3 if aggregation == "poe" else 2.0  # products of experts grow sure of the prior
    np.testing.assert_allclose(std[0] ** 2 - 0.05, expected, rtol=1e-9)
    np.testing.assert_allclose(mean, 0.0, atol=1e-9)


def test_distributed_gps_a_product_is_surer_than_its_surest_expert():
    model = as_given(n_experts=4, aggregation="poe")
    variance = model.predict_experts(X)[1]
    assert (model.predict(X, return_std=True)[1] ** 2 - 0.05 <= variance.min(0) + 1e-12).all()


def test_learning_finds_the_exact_process_with_one_expert():
    exact = GaussianProcessRegressor(ConstantKernel(1.0) * RBF(1.0) + WhiteKernel(0.1), normalize_y=True).fit(X, Y)
    one = DistributedGPRegressor(ConstantKernel(1.0) * RBF(1.0), n_experts=1, aggregation="bcm").fit(X, Y)
    np.testing.assert_allclose(one.log_marginal_likelihood_value_, exact.log_marginal_likelihood_value_, rtol=1e-4)
    np.testing.assert_allclose(one.predict(X), exact.predict(X), atol=1e-2)


@pytest.mark.parametrize("partition", ["random", "segments"])
def test_a_committee_learns_a_function(partition):
    model = DistributedGPRegressor(points_per_expert=40, partition=partition, random_state=0).fit(X, Y)
    assert len(model.partition_) == 4
    assert sorted(np.concatenate(model.partition_)) == list(range(150))
    assert model.score(X, Y) > 0.95
    assert 0.05 < model.noise_**0.5 < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "mean"}, "aggregation='mean' is unknown"),
        ({"partition": "tree"}, "partition='tree' is unknown"),
        ({"noise": 0.0}, "noise=0.0 above 0"),
        ({"n_experts": 200}, "n_experts=200 must lie between 1 and n_samples=150"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistributedGPRegressor(**options).fit(X, Y)


def test_scikit_learn_finds_no_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(DistributedGPRegressor(points_per_expert=50), on_fail=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"] == []
