"""Where a mixture of experts is a model that scikit-learn has too, it gives the same answer."""

import numpy as np
import pytest
from oracles.planted_mixtures import crossing_counts, crossing_lines
from scipy import stats
from scipy.optimize import minimize
from sklearn.cluster import KMeans
from sklearn.linear_model import (
    GammaRegressor,
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    QuantileRegressor,
    Ridge,
)
from sklearn.mixture import GaussianMixture

from moestro.mixtures import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from moestro.mixtures.experts import (
    ConstantExpert,
    GammaExpert,
    GaussianExpert,
    LogisticExpert,
    MultinomialExpert,
    PoissonExpert,
    StudentExpert,
)
from moestro.mixtures.gates import ConstantGate, GaussianGate

rng = np.random.default_rng(0)
X = rng.standard_normal((120, 3)) * [1.0, 10.0, 0.1] + [0.0, 100.0, 5.0]
Y = (X - X.mean(0)) @ np.array([[1.0, 0.5], [0.2, -0.1], [3.0, 2.0]]) + rng.standard_normal((120, 2))
COUNTS = rng.poisson(np.exp(0.3 * X[:, 0] + 0.05 * (X[:, 1] - 100))).astype(float)
CLASSES = np.digitize(Y[:, 0], np.quantile(Y[:, 0], [0.3, 0.7]))


def close(ours, theirs, tolerance=1e-6):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("expert", ["linear", "gaussian"])
def test_softmax_gate_gaussian_c_one_expert_is_least_squares(expert):
    fitted, line = MixtureOfExpertsRegressor(1, expert=expert).fit(X, Y), LinearRegression().fit(X, Y)
    close(fitted.predict(X), line.predict(X))
    close(fitted.expert_coef_[0], line.coef_)
    residual = Y - line.predict(X)
    spread = residual.T @ residual / len(X)
    if expert == "linear":
        spread = np.diag(np.diag(spread))
    close(fitted.expert_covariance_[0], spread)
    close(fitted.loglik_, stats.multivariate_normal([0, 0], spread).logpdf(residual).sum())


def test_softmax_gate_gaussian_c_log_likelihood_in_closed_form():
    y = Y[:, 0]
    residual = y - LinearRegression().fit(X, y).predict(X)
    expected = -len(y) / 2 * (np.log(2 * np.pi * np.mean(residual**2)) + 1)
    fitted = MixtureOfExpertsRegressor(1).fit(X, y)
    close(fitted.loglik_, expected)
    close(fitted.bic(X, y), -2 * expected + 5 * np.log(len(y)))  # model-selection: BIC in closed form


@pytest.mark.parametrize("alpha", [0.1, 1.0, 50.0])
def test_one_expert_is_ridge_regression(alpha):
    fitted = MixtureOfExpertsRegressor(1, expert=GaussianExpert(alpha=alpha)).fit(X, Y)
    close(fitted.predict(X), Ridge(alpha=alpha).fit(X, Y).predict(X))


def test_the_ridge_expert_is_ridge_regression():
    close(MixtureOfExpertsRegressor(1, expert="ridge").fit(X, Y).predict(X), Ridge().fit(X, Y).predict(X))


def test_logistic_experts_one_is_logistic_regression():
    y = CLASSES > 0
    fitted = MixtureOfExpertsClassifier(1, expert=LogisticExpert(alpha=1.0), tol=1e-12).fit(X, y)
    theirs = LogisticRegression(C=1.0, tol=1e-10, solver="newton-cholesky").fit(X, y)
    close(fitted.predict_proba(X), theirs.predict_proba(X))
    close(fitted.expert_coef_[0], theirs.coef_)


def test_hme_em_e_one_logistic_expert_without_ridge():
    y = CLASSES > 1
    fitted = MixtureOfExpertsClassifier(1, expert=LogisticExpert(alpha=0.0), tol=1e-12).fit(X, y)
    theirs = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky").fit(X, y)
    close(fitted.predict_proba(X), theirs.predict_proba(X))


@pytest.mark.parametrize("alpha", [1e-9, 1.0])
def test_multinomial_logit_experts_one_is_multinomial_regression(alpha):
    fitted = MixtureOfExpertsClassifier(1, expert=MultinomialExpert(alpha=alpha), tol=1e-12).fit(X, CLASSES)
    theirs = LogisticRegression(C=1 / alpha, tol=1e-12, solver="newton-cholesky", max_iter=1000).fit(X, CLASSES)
    close(fitted.predict_proba(X), theirs.predict_proba(X), 1e-5 if alpha < 1e-3 else 1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_poisson_experts_one_is_poisson_regression(alpha):
    fitted = MixtureOfExpertsRegressor(1, expert=PoissonExpert(alpha=alpha), tol=1e-12).fit(X, COUNTS)
    theirs = PoissonRegressor(alpha=alpha, tol=1e-12, solver="newton-cholesky").fit(X, COUNTS)
    close(fitted.predict(X), theirs.predict(X))
    if alpha == 0:
        close(fitted.loglik_, stats.poisson(theirs.predict(X)).logpmf(COUNTS).sum())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_gamma_experts_one_is_gamma_regression(alpha):
    y = np.exp(Y[:, 0] / 5)
    fitted = MixtureOfExpertsRegressor(1, expert=GammaExpert(alpha=alpha), tol=1e-13).fit(X, y)
    close(fitted.predict(X), GammaRegressor(alpha=alpha, tol=1e-12, solver="newton-cholesky").fit(X, y).predict(X))


def test_gamma_experts_shape_is_the_most_likely_one():
    y = np.random.default_rng(1).gamma(3.0, 2.0, 400)
    fitted = MixtureOfExpertsRegressor(1, expert="gamma", tol=1e-13).fit(np.zeros((400, 1)), y)
    shape, _, scale = stats.gamma.fit(y, floc=0)
    close(fitted.expert_shape_[0], shape, 1e-5)
    close(fitted.predict(np.zeros((1, 1)))[0], shape * scale, 1e-5)
    close(fitted.loglik_, stats.gamma(shape, scale=scale).logpdf(y).sum())


def test_gamma_experts_follow_the_unit_of_the_target():
    x, y = crossing_counts(0, n=200)
    fits = [MixtureOfExpertsRegressor(2, expert="gamma", random_state=0).fit(x, c * (y + 0.5)) for c in (1, 100)]
    close(fits[1].expert_intercept_, fits[0].expert_intercept_ + np.log(100), 1e-4)
    close(fits[1].loglik_, fits[0].loglik_ - 200 * np.log(100), 1e-5)


def test_laplace_experts_one_is_median_regression():
    x, y = crossing_lines(0, n=200)
    fitted = MixtureOfExpertsRegressor(1, expert="laplace", tol=1e-14, max_iter=2000).fit(x, y)
    theirs = QuantileRegressor(quantile=0.5, alpha=0).fit(x, y)
    close(fitted.predict(x), theirs.predict(x))
    error = np.abs(y - theirs.predict(x)).mean()
    close(fitted.expert_scale_[0, 0], error)
    close(fitted.loglik_, stats.laplace(scale=error).logpdf(y - theirs.predict(x)).sum())


def test_laplace_experts_constant_one_is_the_median():
    y = np.random.default_rng(0).standard_cauchy(101)
    fitted = MixtureOfExpertsRegressor(1, expert="laplace", tol=1e-14).fit(np.zeros((101, 1)), y)
    close(fitted.expert_intercept_[0, 0], np.median(y))


def test_student_experts_with_many_degrees_are_normal():
    x, y = crossing_lines(0, n=500)
    share = np.random.default_rng(0).dirichlet([1, 1], 500)
    options = {"n_experts": 2, "init": share, "tol": 1e-10, "max_iter": 5000}
    normal = MixtureOfExpertsRegressor(expert="gaussian", **options).fit(x, y)
    student = MixtureOfExpertsRegressor(expert=StudentExpert(dof=1e12), **options).fit(x, y)
    close(student.expert_coef_, normal.expert_coef_, 1e-5)
    close(student.loglik_, normal.loglik_)


def test_student_experts_one_is_robust_regression():
    x, y = crossing_lines(0, n=300)
    fitted = MixtureOfExpertsRegressor(1, expert=StudentExpert(dof=3.0), tol=1e-13, max_iter=2000).fit(x, y)
    z = np.hstack([np.ones((300, 1)), x])

    def loss(theta):
        return -stats.t(3, scale=np.exp(theta[2])).logpdf(y - z @ theta[:2]).sum()

    best = minimize(loss, [0.0, 0.0, 0.0], tol=1e-12)
    close(fitted.loglik_, -best.fun)
    close(np.r_[fitted.expert_intercept_[0], fitted.expert_coef_[0, 0]], best.x[:2], 1e-4)


@pytest.mark.parametrize("kind", ["full", "diag", "spherical", "tied"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_constant_experts_and_linear_gaussian_fullcov_with_a_constant_gate_are_a_gaussian_mixture(kind, outputs):
    blobs = np.random.default_rng(0).standard_normal((300, 2)) * [1, 3] + np.repeat(
        [[0, 0], [6, 9], [-5, 9]], 100, 0
    )
    blobs = blobs[:, :outputs]
    theirs = GaussianMixture(3, covariance_type=kind, reg_covar=0, tol=1e-12, max_iter=5000, random_state=0).fit(
        blobs
    )
    start = theirs.predict_proba(blobs)
    fitted = MixtureOfExpertsRegressor(
        3, gate="constant", expert=ConstantExpert(covariance=kind), init=start, tol=1e-12, max_iter=5000
    ).fit(np.zeros((300, 1)), blobs)
    close(fitted.loglik_ / 300, theirs.score(blobs))
    close(fitted.weights_, theirs.weights_)
    close(fitted.expert_mean_, theirs.means_)
    wide = {
        "full": lambda c: c,
        "diag": lambda c: c[:, :, None] * np.eye(outputs),
        "spherical": lambda c: c[:, None, None] * np.eye(outputs),
        "tied": lambda c: np.stack([c] * 3),
    }[kind](theirs.covariances_)
    close(fitted.expert_covariance_, wide, 1e-5)
    zero = np.zeros((300, 1))
    close(fitted.bic(zero, blobs), theirs.bic(blobs))  # model-selection: criteria as GaussianMixture's
    close(fitted.aic(zero, blobs), theirs.aic(blobs))


def test_gaussian_gate_b_with_full_experts_is_a_gaussian_mixture_of_inputs_and_targets():
    x, y = crossing_lines(0, n=400)
    both = np.column_stack([x, y])
    theirs = GaussianMixture(2, reg_covar=0, tol=1e-13, max_iter=20000, random_state=0).fit(both)
    fitted = MixtureOfExpertsRegressor(
        2, gate="gaussian", expert="gaussian", init=theirs.predict_proba(both), tol=1e-13, max_iter=20000
    ).fit(x, y)
    close(fitted.loglik_ / 400, theirs.score(both), 1e-7)
    close(fitted.weights_.sum(), 1.0)
    close(fitted.gate_means_[:, 0], theirs.means_[:, 0], 1e-4)
    close(fitted.expert_coef_[:, 0, 0], theirs.covariances_[:, 0, 1] / theirs.covariances_[:, 0, 0], 1e-4)
    close(fitted.joint_log_prob(x, y), theirs.score_samples(both), 1e-4)
    close(fitted.score_samples(x) + fitted.log_prob(x, y), fitted.joint_log_prob(x, y), 1e-10)


def test_gaussian_gate_c_with_tied_covariance_is_a_linear_softmax():
    x, y = X, Y[:, 0]
    fitted = MixtureOfExpertsRegressor(3, gate=GaussianGate("tied"), random_state=0, tol=1e-5).fit(x, y)
    inverse = np.linalg.inv(fitted.gate_covariances_[0])
    slope = fitted.gate_means_ @ inverse
    weight = np.exp(fitted.mixture_.gate_params["log_weight"])
    logits = x @ slope.T + np.log(weight) - 0.5 * np.einsum("ed,ed->e", slope, fitted.gate_means_)
    share = np.exp(logits - logits.max(1, keepdims=True))
    close(fitted.gate_proba(x), share / share.sum(1, keepdims=True), 1e-9)


def test_gaussian_gate_d_constant_experts_are_a_block_diagonal_gaussian_mixture():
    x, y = crossing_lines(1, n=300)
    fitted = MixtureOfExpertsRegressor(2, gate="gaussian", expert="constant", random_state=0).fit(x, y)
    mixing = np.exp(fitted.mixture_.gate_params["log_weight"])
    density = sum(
        mixing[i]
        * stats.norm(fitted.gate_means_[i, 0], fitted.gate_covariances_[i, 0, 0] ** 0.5).pdf(x[:, 0])
        * stats.norm(fitted.expert_mean_[i, 0], fitted.expert_variance_[i, 0] ** 0.5).pdf(y)
        for i in range(2)
    )
    close(fitted.joint_log_prob(x, y), np.log(density), 1e-9)


def test_hard_moe_with_constant_experts_is_k_means():
    points = np.random.default_rng(0).standard_normal((300, 2)) + np.repeat([[0, 0], [6, 2], [-2, 7]], 100, 0)
    start = points[[0, 1, 2]]
    theirs = KMeans(3, init=start, n_init=1, tol=0).fit(points)
    labels = ((points[:, None] - start) ** 2).sum(2).argmin(1)
    fitted = MixtureOfExpertsRegressor(
        3,
        gate=ConstantGate(equal=True),
        expert=ConstantExpert(covariance="tied-spherical"),
        algorithm="hard-em",
        init=np.eye(3)[labels],
    ).fit(np.zeros((300, 1)), points)
    close(fitted.expert_mean_, theirs.cluster_centers_)
    np.testing.assert_array_equal(fitted.assign(np.zeros((300, 1)), points), theirs.labels_)


def test_hme_em_b_a_tree_of_depth_one_is_flat():
    x, y = crossing_lines(0, n=300)
    flat = MixtureOfExpertsRegressor(3, random_state=0).fit(x, y)
    tree = MixtureOfExpertsRegressor(branching=(3,), random_state=0).fit(x, y)
    close(tree.predict(x), flat.predict(x), 1e-10)
    close(tree.loglik_, flat.loglik_, 1e-10)


def test_hme_em_f_identical_children_are_the_smaller_tree():
    x, y = crossing_lines(0, n=300)
    small = MixtureOfExpertsRegressor(2, random_state=0).fit(x, y)
    share = small.responsibilities(x, y)
    doubled = np.repeat(share / 2, 2, axis=1)
    tree = MixtureOfExpertsRegressor(branching=(2, 2), init=doubled, tol=1e-9).fit(x, y)
    close(tree.loglik_, small.loglik_, 1e-4)


def test_constant_experts_sharpen_to_logistic_regression_on_the_clusters():
    x = np.random.default_rng(0).uniform(-1, 1, (400, 1))
    cluster = (np.random.default_rng(1).random(400) < 1 / (1 + np.exp(-3 * x[:, 0]))).astype(float)
    start = np.eye(2)[(cluster == 0).astype(int)]
    fitted = MixtureOfExpertsRegressor(2, expert=ConstantExpert(fixed_variance=1e-4), init=start, tol=1e-12).fit(
        x, cluster
    )
    theirs = LogisticRegression(C=np.inf, tol=1e-12).fit(x, cluster)
    close(fitted.predict(x), theirs.predict_proba(x)[:, 1], 1e-4)
