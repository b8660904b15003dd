"""Sparse mixing matrices found from a covariance."""

import warnings

import numpy as np
import pytest
from sklearn.decomposition import FastICA
from sklearn.utils.estimator_checks import check_estimator

from moestro.mixtures import SparseGaussianICA


def mixing(seed, features, sources, chance):
    rng = np.random.default_rng(seed)
    return (rng.random((features, sources)) < chance) * rng.standard_normal((features, sources))


def agreement(found, truth):
    """Largest |cosine| of every true column with a found one."""
    unit = [each / np.linalg.norm(each, axis=0) for each in (found, truth)]
    return np.abs(unit[0].T @ unit[1]).max(0)


def test_sparse_gaussian_ica_finds_the_columns_behind_an_exact_covariance():
    for seed in range(4):
        truth = mixing(seed, 60, 5, 0.2)
        fitted = SparseGaussianICA(5).fit_covariance(truth @ truth.T)
        assert agreement(fitted.mixing_, truth).min() > 0.999
        if agreement(fitted.mixing_, truth).min() > 1 - 1e-9:
            np.testing.assert_allclose(fitted.mixing_ @ fitted.mixing_.T, truth @ truth.T, atol=1e-8)


@pytest.mark.nightly
def test_sparse_gaussian_ica_finds_more_columns():
    truth = mixing(0, 200, 8, 0.15)
    fitted = SparseGaussianICA().fit_covariance(truth @ truth.T)
    assert fitted.mixing_.shape == (200, 8)
    np.testing.assert_allclose(agreement(fitted.mixing_, truth), 1.0, atol=1e-6)


def test_sparse_gaussian_ica_of_normal_rows_where_ica_must_fail():
    truth = mixing(1, 60, 4, 0.2)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5000, 4)) @ truth.T
    fitted = SparseGaussianICA(4).fit(x)
    assert agreement(fitted.mixing_, truth).min() > 0.95
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blind = FastICA(4, random_state=0, max_iter=500).fit(x)
    assert agreement(blind.mixing_, truth).min() < 0.95
    sources = fitted.transform(x)
    np.testing.assert_allclose(fitted.inverse_transform(sources), x, atol=1e-6)
    assert fitted.get_feature_names_out().tolist() == [f"sparsegaussianica{k}" for k in range(4)]


@pytest.mark.parametrize(
    ("covariance", "message"), [(np.ones((2, 3)), "symmetric square"), (np.zeros((3, 3)), "rank 0")]
)
def test_sparse_gaussian_ica_refuses_what_is_no_covariance(covariance, message):
    with pytest.raises(ValueError, match=message):
        SparseGaussianICA().fit_covariance(covariance)


def test_sparse_gaussian_ica_scikit_learn_finds_no_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(SparseGaussianICA(), on_fail=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"] == []
