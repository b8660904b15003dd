"""EM climbs, and finds what was planted."""

import warnings

import numpy as np
import pytest
from oracles.planted_mixtures import bent_line, crossing_counts, crossing_lines, split_noise, xor
from scipy.integrate import quad
from sklearn.exceptions import ConvergenceWarning

from moestro.mixtures import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from moestro.mixtures.experts import CLASSIFICATION_EXPERTS, REGRESSION_EXPERTS, ConstantExpert, GaussianExpert
from moestro.mixtures.fitting.em import ALGORITHMS
from moestro.mixtures.gates import GATES, GaussianGate, SoftmaxGate

CLIMBING = [name for name, algorithm in ALGORITHMS.items() if algorithm.monotone]
CLIMBING_GATES = [name for name, gate in GATES.items() if gate().climbs]
KINDS = ["full", "diag", "spherical", "tied", "tied-diag", "tied-spherical"]


def random_problem(seed, expert):
    rng = np.random.default_rng(seed)
    n, d = rng.integers(20, 80), rng.integers(1, 4)
    x = rng.standard_normal((n, d)) * np.exp(rng.standard_normal(d) * 2)
    signal = np.sin(2 * x[:, 0] / x[:, 0].std()) + rng.standard_normal(n) * rng.choice([0.05, 1.0])
    weight = rng.integers(0, 3, n) + 0.5
    if expert in ("multinomial", "logistic"):
        return x, np.digitize(signal, [0] if expert == "logistic" else [-0.5, 0.5]), weight
    if expert == "poisson":
        return x, rng.poisson(np.exp(signal)).astype(float), weight
    if expert == "gamma":
        return x, np.exp(signal), weight
    if expert in ("gaussian", "student", "laplace") and seed % 2:
        return x, np.column_stack([signal, rng.standard_normal(n) + x[:, 0]]), weight
    return x, signal, weight


def worst_fall(estimator, seed, expert):
    x, y, weight = random_problem(seed, expert)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        path = estimator.fit(x, y, weight).loglik_path_
    return (np.diff(path) / (1 + np.abs(path[:-1]))).min(initial=0.0)


def normal(kind):
    return lambda seed: GaussianExpert(kind, alpha=seed % 3)


# what to fit, and whose random problems it is given
REGRESSORS = {name: (lambda seed, name=name: name, name) for name in REGRESSION_EXPERTS if name != "constant"}
REGRESSORS |= {f"normal {kind}": (normal(kind), "gaussian") for kind in KINDS}
REGRESSORS["constant"] = lambda seed: ConstantExpert(KINDS[seed % 6]), "gaussian"
CLASSIFIERS = {
    f"classes {name}": (lambda seed, name=name: name, "logistic" if name == "logistic" else "multinomial")
    for name in CLASSIFICATION_EXPERTS
    if name != "constant"
}


def problem(seed, kind):
    """An estimator, and whose random problem it is given; the seeds go through algorithms, then gates."""
    gate = CLIMBING_GATES[seed // len(CLIMBING) % len(CLIMBING_GATES)]
    rng = np.random.default_rng([7, seed])
    tree = gate == "softmax" and rng.random() < 0.3
    options = {"branching": (2, 2)} if tree else {"n_experts": rng.integers(1, 5)}
    options |= {"algorithm": CLIMBING[seed % len(CLIMBING)], "gate": gate, "n_init": 1, "init": "random"}
    options |= {"random_state": seed, "max_iter": 25, "tol": 0}
    expert, data = (REGRESSORS | CLASSIFIERS)[kind]
    estimator = MixtureOfExpertsRegressor if kind in REGRESSORS else MixtureOfExpertsClassifier
    return estimator(expert=expert(seed), **options), data


def assert_climbs(kind, count):
    for seed in range(count):
        estimator, data = problem(seed, kind)
        fall = worst_fall(estimator, seed, data)
        assert fall > -1e-9, (estimator, seed, fall)


def entry(kind):
    """The name of a kind in the literature's list, so that its check is found by that name."""
    named = {"linear": "softmax_gate_gaussian_a", "gaussian": "linear_gaussian_fullcov", "bayesian": "bayesian_me"}
    named |= {"classes logistic": "logistic_experts", "classes multinomial": "multinomial_logit_experts"}
    named |= {name: f"{name}_experts" for name in ("laplace", "student", "poisson", "gamma", "gp", "svm", "elm")}
    named |= {"skew-normal": "skew_normal_experts", "skew-t": "skew_t_experts"}
    return named.get(kind, kind)


@pytest.mark.parametrize("kind", [*REGRESSORS, *CLASSIFIERS], ids=entry)
def test_hme_em_a_the_likelihood_never_falls(kind):
    assert_climbs(kind, 5)


@pytest.mark.parametrize("seed", [7491, 9472])
def test_gamma_experts_that_nearly_interpolate_still_climb(seed):
    """Shapes reach 1e6 there: a rounding of the deviance comes back a million times larger."""
    estimator, data = problem(seed, "gamma")
    assert worst_fall(estimator, seed, data) > -1e-12


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [*REGRESSORS, *CLASSIFIERS], ids=entry)
def test_the_likelihood_never_falls_over_a_thousand_problems_each(kind):
    assert_climbs(kind, 1000)


@pytest.mark.parametrize("kind", KINDS)
def test_gaussian_gate_a_the_joint_likelihood_never_falls(kind):
    for seed in range(5):
        model = MixtureOfExpertsRegressor(3, gate=GaussianGate(kind), n_init=1, max_iter=25, tol=0)
        assert worst_fall(model, seed, "linear") > -1e-9


def recovered(kind, seed):
    """Largest error of slopes and intercepts, of deviations, and the gate, after ordering by slope."""
    x, y = crossing_lines(seed) if kind == "linear" else crossing_counts(seed)
    fitted = MixtureOfExpertsRegressor(2, expert=kind, random_state=seed).fit(x, y).sort_experts("coef:0")
    lines = np.column_stack([fitted.expert_intercept_, fitted.expert_coef_[:, 0]])
    return fitted, lines


def linear_is_recovered(seed):
    fitted, lines = recovered("linear", seed)
    deviations = np.sqrt(fitted.expert_variance_[:, 0])
    slope, intercept = fitted.gate_coef_[0, 0], fitted.gate_intercept_[0]
    return (
        np.abs(lines - [[1, -2.5], [-1, 2.5]]).max() < 0.16
        and np.abs(deviations - [0.5, 0.8]).max() < 0.05
        and abs(slope - 3) < 0.6
        and abs(intercept - 0.5) < 0.35
    )


def counts_are_recovered(seed):
    fitted, lines = recovered("poisson", seed)
    return np.abs(lines - [[2, -0.8], [0.5, 1]]).max() < 0.2 and abs(-fitted.gate_coef_[0, 0] - 3) < 0.8


def bend_is_recovered(seed):
    x, y = bent_line(seed)
    fitted = MixtureOfExpertsRegressor(2, random_state=seed).fit(x, y).sort_experts("coef:0")
    (a, b), (c, d) = zip(fitted.expert_intercept_[:, 0], fitted.expert_coef_[:, 0, 0], strict=True)
    crossing = (a - c) / (d - b)
    error = np.sqrt(np.mean((fitted.predict(x) - np.abs(x[:, 0] - 0.5)) ** 2))
    return abs(crossing - 0.5) < 0.02 and abs(b + 1) < 0.1 and abs(d - 1) < 0.1 and error < 0.015


@pytest.mark.parametrize("truth", [linear_is_recovered, counts_are_recovered, bend_is_recovered])
def test_softmax_gate_gaussian_b_poisson_experts_and_a_bend_are_recovered(truth):
    assert sum(truth(seed) for seed in range(3)) == 3


@pytest.mark.nightly
@pytest.mark.parametrize("truth", [linear_is_recovered, counts_are_recovered, bend_is_recovered])
def test_planted_truths_are_recovered_in_95_of_100_seeds(truth):
    missed = [seed for seed in range(100) if not truth(seed)]
    assert len(missed) <= 5, missed


def test_logistic_experts_solve_xor():
    for seed in range(2):
        x, y = xor(seed)
        fitted = MixtureOfExpertsClassifier(2, expert="logistic", random_state=0, tol=1e-5).fit(x, y)
        single = MixtureOfExpertsClassifier(1, expert="logistic").fit(x, y)
        assert fitted.score(x, y) > 0.99
        assert single.score(x, y) < 0.65


def test_logistic_experts_constant_have_the_likelihood_of_one_coin():
    x, y = xor(0, n=300)
    fitted = MixtureOfExpertsClassifier(2, gate="constant", expert="constant", random_state=0).fit(x, y)
    p = y.mean()
    np.testing.assert_allclose(fitted.loglik_, 300 * (p * np.log(p) + (1 - p) * np.log(1 - p)), rtol=1e-9)


def test_logistic_experts_sample_the_class_rates():
    x, y = xor(0)
    fitted = MixtureOfExpertsClassifier(2, random_state=0, tol=1e-4).fit(x, y)
    assert abs(fitted.sample(x, random_state=0).mean() - y.mean()) < 0.03


def test_laplace_experts_beat_normal_ones_on_laplace_noise():
    x, y = split_noise("laplace", 0)
    normal = MixtureOfExpertsRegressor(2, random_state=0).fit(x, y)
    laplace = MixtureOfExpertsRegressor(2, expert="laplace", random_state=0).fit(x, y)
    assert laplace.loglik_ > normal.loglik_ + 20


def slope_errors_with_outliers(expert, seed):
    """Relative errors of the slopes when a tenth of the targets is moved by 10 up or down."""
    x, y = crossing_lines(seed)
    rng = np.random.default_rng(seed)
    moved = rng.choice(len(y), len(y) // 10, replace=False)
    y[moved] += rng.choice([-10, 10], len(moved))
    fitted = MixtureOfExpertsRegressor(2, expert=expert, random_state=seed).fit(x, y).sort_experts("coef:0")
    return np.abs(fitted.expert_coef_[:, 0, 0] - [-2.5, 2.5]) / 2.5


@pytest.mark.parametrize("seed", [0, 1])
def test_ten_percent_outliers_bend_normal_experts_only(seed):
    assert slope_errors_with_outliers("student", seed).max() < 0.1
    assert slope_errors_with_outliers("laplace", seed).max() < 0.1
    assert slope_errors_with_outliers("linear", seed).max() > 0.1


def test_student_experts_keep_the_slopes_among_outliers():
    x, y = crossing_lines(0)
    y = y.copy()
    y[np.random.default_rng(0).choice(2000, 100, replace=False)] = -15
    robust = MixtureOfExpertsRegressor(2, expert="student", random_state=0).fit(x, y).sort_experts("coef:0")
    normal = MixtureOfExpertsRegressor(2, expert="linear", random_state=0).fit(x, y).sort_experts("coef:0")
    truth = np.array([[1, -2.5], [-1, 2.5]])
    lines = [np.column_stack([m.expert_intercept_, m.expert_coef_[:, 0]]) for m in (robust, normal)]
    assert np.abs(lines[0] - truth).max() < 0.15
    assert robust.expert_dof_.min() < 2
    assert np.abs(lines[1] - truth).max() > 1


DENSITIES = ["linear", "laplace", "student", "skew-normal", "skew-t", "poisson", "gamma"]


@pytest.mark.parametrize("expert", DENSITIES, ids=entry)
def test_densities_integrate_to_one_and_agree_with_quantiles_and_draws(expert):
    x, y = crossing_counts(0, n=300)
    y = y if expert == "poisson" else y + 0.5
    fitted = MixtureOfExpertsRegressor(2, expert=expert, random_state=0, tol=1e-4).fit(x, y)
    one = x[:1]
    if expert == "poisson":
        grid = np.arange(200.0)
        density = fitted.predict_density(np.repeat(one, 200, 0), grid)
        total, mean, low = density.sum(), (density * grid).sum(), np.searchsorted(density.cumsum(), 0.25)
    else:
        reach = (1e-12, 500) if expert == "gamma" else (-500, 500)
        middle = fitted.predict(one)[0]

        def at(value):
            return fitted.predict_density(one, [value])[0]

        total = quad(at, *reach, points=[middle], limit=500)[0]
        mean = quad(lambda v: v * at(v), *reach, points=[middle], limit=500)[0]
        low = fitted.predict_quantiles(one, 0.25)[0, 0]
        np.testing.assert_allclose(quad(at, reach[0], low, limit=500)[0], 0.25, atol=1e-4)
    np.testing.assert_allclose(total, 1.0, atol=2e-3)
    np.testing.assert_allclose(mean, fitted.predict(one)[0], rtol=0.02)
    np.testing.assert_allclose(fitted.predict_quantiles(one, [0.25])[0, 0], low)
    draws = fitted.sample(np.repeat(one, 20000, 0), random_state=0)
    below, above = fitted.predict_interval(one, 0.5)
    inside = ((draws >= below) & (draws <= above)).mean()
    assert (0.49 < inside < 0.51) if expert != "poisson" else inside >= 0.5


def test_total_variance():
    x, y = crossing_lines(0, n=300)
    fitted = MixtureOfExpertsRegressor(2, random_state=0, tol=1e-5).fit(x, y)
    mean, std = fitted.predict(x[:1], return_std=True)
    draws = fitted.sample(np.repeat(x[:1], 100000, 0), random_state=0)
    np.testing.assert_allclose([mean[0], std[0]], [draws.mean(), draws.std()], rtol=0.02, atol=0.01)


def test_softmax_gate_gaussian_f_units_do_not_matter():
    x, y = crossing_lines(0, n=300)
    fits = [
        MixtureOfExpertsRegressor(2, random_state=0).fit(a, b)
        for a, b in [(x, y), (1e3 * x + 2000, y), (x, 7 * y + 3)]
    ]
    np.testing.assert_allclose(fits[1].loglik_, fits[0].loglik_, rtol=1e-6)
    np.testing.assert_allclose(fits[2].loglik_, fits[0].loglik_ - 300 * np.log(7), rtol=1e-6)


def test_linear_gaussian_fullcov_follows_affine_maps_of_the_target():
    x, y = crossing_lines(0, n=200)
    both = np.column_stack([y, x[:, 0] ** 2 + np.random.default_rng(0).standard_normal(200)])
    share = MixtureOfExpertsRegressor(2, random_state=0).fit(x, y).responsibilities(x, y)
    turn = np.array([[2.0, 1.0], [0.5, -3.0]])
    fits = [
        MixtureOfExpertsRegressor(2, expert="gaussian", init=share, tol=1e-10).fit(x, t)
        for t in (both, both @ turn.T)
    ]
    np.testing.assert_allclose(fits[1].loglik_, fits[0].loglik_ - 200 * np.log(abs(np.linalg.det(turn))), rtol=1e-6)


def test_hme_em_d_leaves_sum_to_one_and_nodes_multiply_to_leaves():
    x, y = crossing_lines(0, n=300)
    fitted = MixtureOfExpertsRegressor(branching=(2, 3), random_state=0, tol=1e-4, n_init=1).fit(x, y)
    top, bottom = fitted.node_proba(x)
    assert (top.shape, bottom.shape) == ((300, 1, 2), (300, 2, 3))
    np.testing.assert_allclose((top[:, 0, :, None] * bottom).reshape(300, 6), fitted.gate_proba(x), atol=1e-12)
    np.testing.assert_allclose(fitted.gate_proba(x).sum(1), 1.0)
    np.testing.assert_allclose(fitted.responsibilities(x, y).sum(1), 1.0)


def test_softmax_gate_gaussian_e_a_change_point_reaches_the_best_two_segment_fit():
    rng = np.random.default_rng(0)
    x = np.arange(60.0)
    y = np.where(x < 35, 0.1 * x, 8 - 0.2 * x) + 0.3 * rng.standard_normal(60)

    def segment(keep):
        z = np.column_stack([np.ones(keep.sum()), x[keep]])
        error = y[keep] - z @ np.linalg.lstsq(z, y[keep], rcond=None)[0]
        return -keep.sum() / 2 * (np.log(2 * np.pi * np.mean(error**2)) + 1)

    best = max(segment(x < cut) + segment(x >= cut) for cut in range(4, 57))
    sharp = SoftmaxGate(alpha=1e-9)  # the best gate is a step
    fitted = MixtureOfExpertsRegressor(2, gate=sharp, tol=1e-9, random_state=0).fit(x[:, None], y)
    assert fitted.loglik_ > best - 0.05


def test_hard_moe_agrees_with_em_in_separated_regions():
    x, y = crossing_lines(0, n=600)
    y = np.where(x[:, 0] < 0, 10 + x[:, 0], -10 - x[:, 0]) + 0.1 * np.random.default_rng(0).standard_normal(600)
    soft = MixtureOfExpertsRegressor(2, random_state=0).fit(x, y).sort_experts("intercept")
    hard = MixtureOfExpertsRegressor(2, algorithm="hard-em", random_state=0).fit(x, y).sort_experts("intercept")
    np.testing.assert_allclose(hard.expert_coef_, soft.expert_coef_, atol=1e-3)
    sure = soft.gate_proba(x).max(1) > 0.999
    np.testing.assert_allclose(soft.predict(x)[sure], soft.predict_hard(x)[sure], atol=0.05)


@pytest.mark.parametrize("algorithm", ["stochastic-em", "annealed-em", "gem", "ecm", "mm"])
def test_every_algorithm_finds_the_crossing_lines(algorithm):
    x, y = crossing_lines(0)
    best = MixtureOfExpertsRegressor(2, random_state=0).fit(x, y)
    other = MixtureOfExpertsRegressor(2, algorithm=algorithm, random_state=0, n_init=2, init="random").fit(x, y)
    assert other.loglik_ > best.loglik_ - (3 if algorithm == "stochastic-em" else 0.2)


def test_multinomial_logit_experts_separate_three_blobs():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 300)
    x = rng.standard_normal((300, 2)) + np.array([[0, 0], [4, 0], [0, 4]])[label]
    fitted = MixtureOfExpertsClassifier(random_state=0, tol=1e-4).fit(x, np.array(["a", "b", "c"])[label])
    assert fitted.score(x, np.array(["a", "b", "c"])[label]) > 0.95
