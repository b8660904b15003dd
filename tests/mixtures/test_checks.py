"""What is left of the catalogue's checks, entry by entry; the name of a test starts with its entry."""

import warnings

import numpy as np
import pytest
from oracles.planted_mixtures import bent_line, crossing_counts, crossing_lines, xor
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import BayesianRidge, LinearRegression, LogisticRegression
from sklearn.svm import SVC

from moestro.mixtures import (
    GatedEnsembleClassifier,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    OnlineMixtureOfExpertsRegressor,
    logit,
)
from moestro.mixtures.experts import (
    CLASSIFICATION_EXPERTS,
    REGRESSION_EXPERTS,
    BayesianExpert,
    GaussianExpert,
    NoisyExpert,
)
from moestro.mixtures.fitting.em import ALGORITHMS
from moestro.mixtures.gates import GATES, ConstantGate
from moestro.mixtures.gp import committee
from moestro.mixtures.leaves import LinearLeaves
from moestro.mixtures.theory import softmax_least_squares_rates, sparse_moe_bound, voronoi_loss


def entropy(fitted, x):
    share = fitted.gate_proba(x)
    return -(share * np.log(np.maximum(share, 1e-300))).sum(1).mean()


def test_jacobs_1991_blending_keeps_more_experts_active():
    gaps = []
    for seed in range(2):
        x, y = bent_line(seed, n=300)
        options = {"algorithm": "gradient", "random_state": seed}
        fits = [MixtureOfExpertsRegressor(2, loss=loss, **options).fit(x, y) for loss in ("blend", "mixture")]
        gaps.append(entropy(fits[0], x) - entropy(fits[1], x))
    assert np.mean(gaps) > 0


def test_hme_em_c_a_binary_tree_reaches_the_flat_gate_on_change_points():
    rng = np.random.default_rng(0)
    x = np.arange(80.0)
    y = np.choose(np.minimum((x // 20).astype(int), 3), [0.1 * x, 4 - 0.1 * x, 5 + 0 * x, 0.2 * x - 12])
    y = y + 0.2 * rng.standard_normal(80)
    options = {"random_state": 0, "tol": 1e-8, "n_init": 10}
    flat = MixtureOfExpertsRegressor(4, **options).fit(x[:, None], y)
    tree = MixtureOfExpertsRegressor(branching=(2, 2), **options).fit(x[:, None], y)
    np.testing.assert_allclose(tree.loglik_, flat.loglik_, atol=1.0)


def test_hme_online_a_constant_share_is_repetition():
    """With λ = 1 a row that a leaf holds with weight two is that row seen twice, and both are least squares."""
    rng = np.random.default_rng(0)
    rows, targets = np.column_stack([np.ones(40), rng.standard_normal(40)]), rng.standard_normal((40, 1))

    def learn(order, share):
        leaves = LinearLeaves(np.zeros((1, 2, 1)), prior=10.0, forgetting=1.0)
        for seen, row in enumerate(order):
            leaves.learn(rows[row], targets[row], np.array([share]), 1.0, seen)
        return leaves.coef[0, :, 0]

    twice, heavy = learn(np.repeat(np.arange(40), 2), 1.0), learn(np.arange(40), 2.0)
    weighted = np.linalg.solve(2 * rows.T @ rows + np.eye(2) / 10, 2 * rows.T @ targets[:, 0])
    np.testing.assert_allclose(twice, weighted, atol=1e-10)
    np.testing.assert_allclose(heavy, weighted, atol=1e-10)


def test_linear_gaussian_fullcov_one_expert_is_multivariate_regression():
    x, y = crossing_lines(0, n=200)
    both = np.column_stack([y, x[:, 0] ** 2 + y / 2])
    fitted = MixtureOfExpertsRegressor(1, expert="gaussian").fit(x, both)
    line = LinearRegression().fit(x, both)
    error = both - line.predict(x)
    np.testing.assert_allclose(fitted.expert_coef_[0], line.coef_, atol=1e-8)
    np.testing.assert_allclose(fitted.expert_covariance_[0], error.T @ error / 200, atol=1e-8)


def test_hard_moe_one_expert_is_trivial_and_the_classification_likelihood_climbs():
    x, y = crossing_lines(0, n=300)
    hard, soft = (MixtureOfExpertsRegressor(1, algorithm=name).fit(x, y) for name in ("hard-em", "em"))
    np.testing.assert_allclose(hard.predict(x), soft.predict(x), atol=1e-9)
    path = MixtureOfExpertsRegressor(3, algorithm="hard-em", random_state=0).fit(x, y).loglik_path_
    assert (np.diff(path) >= -1e-9 * np.abs(path[:-1])).all()


def test_svm_mixture_of_one_machine_has_its_sign():
    x, y = xor(0, n=200)
    mixture = GatedEnsembleClassifier(SVC(), 1, random_state=0).fit(x, y)
    single = SVC().fit(x, y)
    sure = np.abs(single.decision_function(x)) > 1e-2  # the solver stops by the order of the rows
    np.testing.assert_array_equal(mixture.predict(x)[sure], single.predict(x)[sure])


def test_svm_mixture_with_a_flat_gate_is_the_plain_average():
    x, y = xor(0, n=200)
    mixture = GatedEnsembleClassifier(SVC(), 3, alpha=1e12, max_rounds=1, random_state=0).fit(x, y)
    share = mixture.gate_proba(x)
    np.testing.assert_allclose(share - share[:1], 0.0, atol=1e-6)  # no input moves the gate
    mean = np.einsum("e,tec->tc", share[0], mixture.predict_experts(x))
    np.testing.assert_allclose(mixture.predict_proba(x), mean, atol=1e-6)


def test_multinomial_logit_experts_renamed_classes_are_renamed_probabilities():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((150, 2))
    y = (x @ [[1.0, -1, 0], [0, 1, -1]] + rng.gumbel(size=(150, 3))).argmax(1)
    order = np.array([2, 0, 1])
    fits = [MixtureOfExpertsClassifier(2, init="segments", tol=1e-9).fit(x, t) for t in (y, order[y])]
    np.testing.assert_allclose(fits[1].predict_proba(x)[:, order], fits[0].predict_proba(x), atol=1e-5)


def test_multinomial_logit_experts_need_the_whole_hessian():
    """Newton reaches the top in a few steps; steps by single classes overshoot where classes overlap."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 300)
    z = np.column_stack([np.ones(300), rng.standard_normal((300, 2)) + np.array([[0, 0], [1, 0], [0, 1]])[label]])
    target, couple, ridge = np.eye(3)[label], logit.coupling(3), np.full(3, 1e-8)

    def slope(coef):
        return (target - logit.class_shares(z, coef))[:, :2].T @ z

    coef = logit.fit_logit(z, target, np.ones(300), np.zeros((2, 3)), couple, ridge, steps=19)
    assert np.abs(slope(coef)).max() < 1e-5  # where a step promises less than the rounding of the objective

    def value(coef):
        return float((target * logit.log_softmax(z, coef)).sum())

    blocks, path = np.zeros((2, 3)), []
    for _ in range(12):
        share = logit.class_shares(z, blocks)
        path.append(value(blocks))
        for c in range(2):
            curvature = z.T @ ((share[:, c] * (1 - share[:, c]))[:, None] * z)
            blocks[c] = blocks[c] + np.linalg.solve(curvature, slope(np.copy(blocks))[c])
    far = np.array([[0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])  # a start where single classes overshoot
    share = logit.class_shares(z, far)
    moved = far + np.stack(
        [np.linalg.solve(z.T @ ((share[:, c] * (1 - share[:, c]))[:, None] * z), slope(far)[c]) for c in range(2)]
    )
    assert value(moved) < value(far)
    assert value(logit.fit_logit(z, target, np.ones(300), far, couple, ridge, steps=1)) > value(far)


def test_poisson_experts_that_ignore_the_inputs_are_a_poisson_mixture():
    rng = np.random.default_rng(0)
    y = rng.poisson(np.where(rng.random(500) < 0.3, 2.0, 9.0)).astype(float)
    x = np.zeros((500, 1))
    fitted = MixtureOfExpertsRegressor(2, gate="constant", expert="poisson", tol=1e-12, max_iter=5000).fit(x, y)
    rates = fitted.predict_experts(x[:1])[0, :, 0]
    by_hand = np.log(sum(w * stats.poisson(r).pmf(y) for w, r in zip(fitted.weights_, rates, strict=True))).sum()
    np.testing.assert_allclose(fitted.loglik_, by_hand, rtol=1e-9)

    def loss(theta):
        share = expit(theta[0])
        return -np.log(
            share * stats.poisson(np.exp(theta[1])).pmf(y) + (1 - share) * stats.poisson(np.exp(theta[2])).pmf(y)
        ).sum()

    best = minimize(loss, [0.0, 0.0, 2.0], tol=1e-10).fun
    np.testing.assert_allclose(fitted.loglik_, -best, rtol=1e-6)


def test_distributed_gps_experts_that_learned_nothing_have_no_vote():
    mean, variance = np.zeros((3, 2)), np.full((3, 2), 1.5)
    center, spread = committee(mean, variance, np.full(2, 1.5), "rbcm")
    np.testing.assert_allclose(center, 0.0)
    np.testing.assert_allclose(spread, 1.5)


def test_distributed_gps_partial_sums_in_any_tree_are_the_flat_committee():
    rng = np.random.default_rng(0)
    mean, prior = rng.standard_normal((4, 5)), np.full(5, 2.0)
    variance = prior * rng.uniform(0.1, 0.9, (4, 5))
    power = 0.5 * (np.log(prior) - np.log(variance))
    leaves = [(power[k] / variance[k], power[k] / variance[k] * mean[k], power[k]) for k in range(4)]

    def join(a, b):
        return tuple(left + right for left, right in zip(a, b, strict=True))

    for root in (
        join(join(leaves[0], leaves[1]), join(leaves[2], leaves[3])),
        join(leaves[0], join(leaves[3], join(leaves[1], leaves[2]))),
    ):
        precision, pull, votes = root
        total = precision + (1 - votes) / prior
        center, spread = committee(mean, variance, prior, "rbcm")
        np.testing.assert_allclose(pull / total, center)
        np.testing.assert_allclose(1 / total, spread)


def test_distributed_gps_one_robust_expert_is_the_process_exactly_where_its_power_is_one():
    """`β/σ² + (1 - β)/σ0²` is `1/σ²` only where β = 1 (or nothing was learned): one rBCM expert is tempered."""
    prior = np.full(3, 2.0)
    variance = prior * np.exp([-2.0, -1.0, -3.0])  # powers 1, ½ and 3/2
    mean = np.ones((1, 3))
    center, spread = committee(mean, variance[None], prior, "rbcm")
    np.testing.assert_allclose([center[0], spread[0]], [1.0, variance[0]])
    assert abs(spread[1] - variance[1]) > 0.1
    assert abs(spread[2] - variance[2]) > 0.01


def test_product_of_experts_equal_experts_return_themselves():
    rng = np.random.default_rng(0)
    mean, variance = np.tile(rng.standard_normal((1, 4)), (3, 1)), np.full((3, 4), 0.3)
    center, spread = committee(mean, variance, np.full(4, 1.0), "gpoe")
    np.testing.assert_allclose(center, mean[0])
    np.testing.assert_allclose(spread, 0.3)
    x, y = xor(0, n=200)
    one = GatedEnsembleClassifier(LogisticRegression(), 1, combine="product", random_state=0).fit(x, y)
    alone = one.estimators_[0].predict_proba(x)
    np.testing.assert_allclose(one.predict_proba(x), alone, atol=1e-9)


def test_product_of_experts_is_surer_and_a_mixture_less_sure_than_its_parts():
    x, y = crossing_lines(0, n=300)
    fitted = MixtureOfExpertsRegressor(2, random_state=0).fit(x, y)
    share, std = fitted.gate_proba(x), fitted.predict(x, return_std=True)[1]
    assert (std**2 >= share @ fitted.expert_variance_[:, 0] - 1e-9).all()
    center, spread = committee(
        fitted.predict_experts(x)[:, :, 0].T, np.tile(fitted.expert_variance_, (1, 300)), np.full(300, 1e9), "poe"
    )
    assert (spread <= fitted.expert_variance_.min() + 1e-12).all()
    assert center.shape == (300,)


def test_softmax_lse_rates():
    rates = softmax_least_squares_rates(np.array([1e3, 1e6]))
    np.testing.assert_allclose(rates["function"], np.sqrt(np.log([1e3, 1e6]) / [1e3, 1e6]))
    np.testing.assert_allclose(rates["over"], np.sqrt(rates["exact"]))
    slow = softmax_least_squares_rates(1e6, strongly_identifiable=False)
    assert slow["exact"] > rates["over"][1] > rates["exact"][1]
    with pytest.raises(ValueError, match="at least 2"):
        softmax_least_squares_rates(1)


def fit_sigmoid_mixture(x, y, start):
    """Least squares of two softmax-gated sigmoid experts from near the truth; atoms (weight, slope, expert)."""

    def unpack(theta):
        a0, a1, b, c = theta[0], theta[1], theta[2:4], theta[4:6]
        return a0, a1, b, c

    def loss(theta):
        a0, a1, b, c = unpack(theta)
        share = expit(a0 + a1 * x)
        gap = share * expit(b[0] + c[0] * x) + (1 - share) * expit(b[1] + c[1] * x) - y
        return float(gap @ gap)

    theta = minimize(loss, start, method="BFGS", options={"gtol": 1e-10}).x
    a0, a1, b, c = unpack(theta)
    return np.exp([a0, 0.0]), np.array([[a1], [0.0]]), np.column_stack([b, c])


@pytest.mark.nightly
def test_softmax_lse_parameters_of_exactly_fitted_atoms_come_at_the_root_rate():
    truth = np.array([0.3, 4.0, 1.0, -2.0, 3.0, -4.0])
    atoms = np.exp([0.3, 0.0]), np.array([[4.0], [0.0]]), np.array([[1.0, 3.0], [-2.0, -4.0]])
    sizes, losses = [500, 2000, 8000, 32000], []
    for n in sizes:
        each = []
        for seed in range(30):
            rng = np.random.default_rng(seed)
            x = rng.uniform(-2, 2, n)
            share = expit(0.3 + 4 * x)
            y = share * expit(1 + 3 * x) + (1 - share) * expit(-2 - 4 * x) + 0.02 * rng.standard_normal(n)
            each.append(voronoi_loss(*fit_sigmoid_mixture(x, y, truth), *atoms))
        losses.append(np.median(each))
    slope = np.polyfit(np.log(sizes), np.log(losses), 1)[0]
    assert -0.65 <= slope <= -0.35


def test_sparse_moe_bound_in_sparsity_and_experts():
    k = np.arange(1.0, 17.0)
    assert (np.diff(k * (1 + np.log(16 / k))) > 0).all()
    bounds = sparse_moe_bound(1e6, 16, k, 50, 0.0)
    assert (np.diff(bounds) > 0).all()
    more = sparse_moe_bound(1e12, np.array([4.0, 16.0, 64.0]), 2, 50, 0.0) ** 2
    np.testing.assert_allclose(np.diff(more)[0], np.diff(more)[1], rtol=1e-6)  # E counts by its logarithm
    full = sparse_moe_bound(1e6, np.array([8.0, 8.0]), np.array([8.0, 8.0]), 50, 0.0)
    np.testing.assert_allclose(full, 2 * np.sqrt((2 * 8 * 50 + 50 * np.log(2e6) + np.log(80)) / 2e6))


@pytest.mark.parametrize("expert", ["linear", "student", "poisson"])
def test_model_selection_icl_is_never_below_bic(expert):
    x, y = crossing_counts(0, n=200)
    fitted = MixtureOfExpertsRegressor(3, expert=expert, random_state=0, tol=1e-4).fit(x, y)
    assert fitted.icl(x, y) >= fitted.bic(x, y)


def test_parsimonious_moe_equal_and_tied_is_counted_so():
    x, y = crossing_lines(0, n=200)
    model = MixtureOfExpertsRegressor(
        3, gate=ConstantGate(equal=True), expert=GaussianExpert("tied"), random_state=0
    )
    fitted = model.fit(x, y)
    assert fitted.n_parameters_ == 3 * 2 + 1
    np.testing.assert_allclose(fitted.weights_, 1 / 3)


def test_parsimonious_moe_noise_takes_the_rows_that_nobody_explains():
    rng = np.random.default_rng(0)
    x, y = crossing_lines(0, n=1000)
    wild = rng.choice(1000, 100, replace=False)
    y = y.copy()
    y[wild] = rng.uniform(-30, 30, 100)
    options = {"random_state": 0, "n_init": 10}
    noisy = MixtureOfExpertsRegressor(3, expert=NoisyExpert(), **options).fit(x, y)
    plain = MixtureOfExpertsRegressor(2, **options).fit(x, y)
    slopes = np.sort(noisy.expert_coef_[:, 0, 0])
    np.testing.assert_allclose(slopes, [-2.5, 2.5], atol=0.25)
    assert np.abs(np.sort(plain.expert_coef_[:, 0, 0]) - [-2.5, 2.5]).max() > 0.25
    far = np.abs(y) > 8
    assert (noisy.responsibilities(x, y)[far, -1] > 0.95).all()
    assert 0.05 < noisy.weights_[-1] < 0.15
    np.testing.assert_allclose(noisy.noise_range_[:, 0], [y.min(), y.max()])
    drawn = noisy.sample(x, random_state=0)
    assert y.min() <= drawn.min() + 3
    path = noisy.loglik_path_
    assert (np.diff(path) / (1 + np.abs(path[:-1]))).min() > -1e-9


def test_parsimonious_moe_noise_without_a_share_is_the_plain_model():
    x, y = crossing_lines(0, n=300)
    plain = MixtureOfExpertsRegressor(2, gate="constant", random_state=0).fit(x, y)
    start = np.column_stack([plain.responsibilities(x, y), np.zeros(300)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        noisy = MixtureOfExpertsRegressor(3, gate="constant", expert=NoisyExpert(), init=start).fit(x, y)
    np.testing.assert_allclose(noisy.loglik_, plain.loglik_, rtol=1e-5)
    with pytest.raises(ValueError, match="the last is the noise"):
        MixtureOfExpertsRegressor(1, expert=NoisyExpert()).fit(x, y)
    with pytest.raises(ValueError, match="The noise is the last expert"):
        noisy.sort_experts("weight").sort_experts(lambda m: -np.arange(3))


def test_bayesian_me_one_expert_is_bayesian_ridge():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 5))
    y = x @ [1.0, 0.5, 0.0, 0.0, 0.0] + 0.5 * rng.standard_normal(60)
    fitted = MixtureOfExpertsRegressor(1, expert="bayesian", tol=1e-10, max_iter=2000).fit(x, y)
    standard, target = fitted.scaling_.x(x), fitted.scaling_.y(y[:, None])[:, 0]
    theirs = BayesianRidge(alpha_1=0, alpha_2=0, lambda_1=0, lambda_2=0, tol=1e-10, max_iter=5000).fit(
        standard, target
    )
    np.testing.assert_allclose(fitted.expert_precision_[0], theirs.lambda_, rtol=1e-2)
    np.testing.assert_allclose(fitted.predict(x), y.mean() + y.std() * theirs.predict(standard), atol=2e-3)


def test_bayesian_me_the_bound_never_falls():
    for seed in range(5):
        x, y = crossing_lines(seed, n=60)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = MixtureOfExpertsRegressor(3, expert="bayesian", init="random", n_init=1, max_iter=40, tol=0)
            path = model.set_params(random_state=seed).fit(x, y).loglik_path_
        assert (np.diff(path) / (1 + np.abs(path[:-1]))).min() > -1e-9


def test_bayesian_me_flat_priors_and_many_rows_are_maximum_likelihood():
    x, y = crossing_lines(0)
    flat = MixtureOfExpertsRegressor(2, expert=BayesianExpert(precision=1e-6), random_state=0, tol=1e-8).fit(x, y)
    plain = MixtureOfExpertsRegressor(2, random_state=0, tol=1e-8).fit(x, y)
    flat, plain = flat.sort_experts("coef:0"), plain.sort_experts("coef:0")
    np.testing.assert_allclose(flat.expert_coef_, plain.expert_coef_, atol=0.01)
    np.testing.assert_allclose(flat.predict(x), plain.predict(x), atol=0.02)


CELLS = [({"gate": gate}, "regressor") for gate in GATES]
CELLS += [({"expert": expert}, "regressor") for expert in REGRESSION_EXPERTS]
CELLS += [({"expert": expert}, "classifier") for expert in CLASSIFICATION_EXPERTS]
CELLS += [({"algorithm": name}, kind) for name in (*ALGORITHMS, "gradient") for kind in ("regressor", "classifier")]
CELLS += [({"branching": (2, 2)}, kind) for kind in ("regressor", "classifier")]
CELLS += [({"algorithm": "gradient", "loss": loss}, "regressor") for loss in ("blend", "expected", "mixture")]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("options", "kind"), CELLS, ids=str)
def test_survey_map_every_cell_fits_predicts_and_draws(options, kind):
    x, y = crossing_counts(0, n=60)
    common = {"random_state": 0, "n_init": 1, "max_iter": 10}
    if kind == "classifier":
        model = MixtureOfExpertsClassifier(**options, **common).fit(x, y > np.median(y))
        proba = model.predict_proba(x)
        np.testing.assert_allclose(proba.sum(1), 1.0)
        np.testing.assert_array_equal(model.classes_[proba.argmax(1)], model.predict(x))
        assert set(model.sample(x, random_state=0)) <= set(model.classes_)
        return
    model = MixtureOfExpertsRegressor(**options, **common).fit(x, y + 0.5)
    assert np.isfinite(model.predict(x)).all()
    assert np.isfinite(model.log_prob(x, y + 0.5)).all()
    assert model.sample(x, random_state=0).shape == (60,)
    np.testing.assert_allclose(model.gate_proba(x).sum(1), 1.0)


def test_survey_map_online_learning_is_a_cell_too():
    x, y = bent_line(0, n=100)
    assert OnlineMixtureOfExpertsRegressor(2, random_state=0).fit(x, y).predict(x).shape == (100,)
