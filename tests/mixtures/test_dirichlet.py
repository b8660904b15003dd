"""Samplers: each move against what it must leave unchanged, then the posteriors of known worlds."""

import warnings

import numpy as np
import pytest
from oracles.planted_mixtures import xor
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import check_estimator

from moestro.mixtures import DirichletProcessMixtureOfExpertsClassifier, DirichletProcessMixtureOfExpertsRegressor
from moestro.mixtures.dirichlet import gp_chain, logit_chain, mcmc
from moestro.mixtures.gates import GaussianGate


def step_with_two_noises(seed, n=100):
    rng = np.random.default_rng(seed)
    x = np.sort(rng.uniform(-2, 2, n))
    left = x < 0
    y = np.where(left, 0.5 * np.sin(4 * x), 3.0) + np.where(left, 0.05, 0.5) * rng.standard_normal(n)
    return x[:, None], y, left


def gp_settings(**changes):
    options = {
        "n_auxiliary": 3,
        "alpha": None,
        "width": None,
        "hyperparameters": None,
        "n_init_experts": 2,
    }
    return gp_chain.Settings(**{**options, **changes})


def test_slices_have_the_density():
    rng = np.random.RandomState(0)
    at, draws = 3.0, []
    for _ in range(4000):
        at = mcmc.slice_sample(lambda v: 2 * np.log(v) - v if v > 0 else -np.inf, at, 1.0, rng)
        draws.append(at)
    assert stats.kstest(draws[::4], stats.gamma(3).cdf).pvalue > 1e-3


def test_diagnostics_of_independent_and_of_stuck_chains():
    rng = np.random.default_rng(0)
    free = rng.standard_normal((2, 500))
    assert mcmc.potential_scale_reduction(free) < 1.02
    assert 700 < mcmc.effective_sample_size(free) < 1400
    stuck = free * 0.01 + np.array([[0.0], [1.0]])
    assert mcmc.potential_scale_reduction(stuck) > 5
    assert mcmc.effective_sample_size(stuck) < 10
    slow = np.stack([np.convolve(rng.standard_normal(600), 0.95 ** np.arange(100))[100:600] for _ in range(2)])
    expected = 1000 * (1 - 0.95) / (1 + 0.95)
    assert 0.4 * expected < mcmc.effective_sample_size(slow) < 2.5 * expected
    assert np.isnan(mcmc.potential_scale_reduction(free[:, :3]))
    assert mcmc.potential_scale_reduction(np.ones((2, 10))) == 1.0


def test_infinite_gp_experts_one_expert_is_the_process():
    x, y, _ = step_with_two_noises(0)
    model = DirichletProcessMixtureOfExpertsRegressor(
        alpha=1e-12, hyperparameters=(2.0, 0.7, 0.05), n_burn=2, n_samples=3, random_state=0
    ).fit(x, y)
    exact = GaussianProcessRegressor(ConstantKernel(2.0) * RBF(0.7), alpha=0.05, optimizer=None)
    exact.fit((x - x.mean()) / x.std(), (y - y.mean()) / y.std())
    grid = np.linspace(-3, 3, 30)[:, None]
    mean, std = exact.predict((grid - x.mean()) / x.std(), return_std=True)
    found = model.predict(grid, return_std=True)
    np.testing.assert_allclose(found[0], y.mean() + y.std() * mean, atol=1e-6)
    np.testing.assert_allclose(found[1], y.std() * np.sqrt(std**2 + 0.05), atol=1e-6)
    assert (model.n_experts_trace_ == 1).all()
    assert model.coclustering_.min() == 1.0


def test_infinite_gp_experts_rows_come_and_go_as_in_refits():
    x, y, _ = step_with_two_noises(1, n=25)
    chain = gp_chain.GPChain(x, y, gp_settings(n_init_experts=1), 0)
    expert = chain.experts[0]
    inverse, others = expert.inverse.copy(), [t for t in range(25) if t != 7]
    mean, variance = gp_chain.predictive(x[7:8], x[others], y[others], expert.hyper)
    # leave one out by the inverse (Rasmussen & Ghahramani 2001, below eq. 5)
    np.testing.assert_allclose(y[7] - inverse[7] @ y / inverse[7, 7], mean[0], atol=1e-8)
    np.testing.assert_allclose(1 / inverse[7, 7], variance[0], rtol=1e-8)
    expert.remove(7)
    np.testing.assert_allclose(expert.log_density(7, y), stats.norm(mean[0], variance[0] ** 0.5).logpdf(y[7]))
    expert.add(7)
    grown = expert.inverse.copy()
    expert.renew()
    np.testing.assert_allclose(grown, expert.inverse, rtol=1e-6, atol=1e-8)


class PriorChain(gp_chain.GPChain):
    """A chain that does not look at the targets."""

    def log_densities(self, row):
        return np.zeros(len(self.experts))

    def log_empty(self, row, hyper):
        return np.zeros(len(hyper))


def test_infinite_gp_experts_wide_kernels_are_the_chinese_restaurant():
    n, alpha = 15, 1.5
    x = np.random.default_rng(0).standard_normal((n, 1))
    settings = gp_settings(alpha=alpha, width=1e6, hyperparameters=(1.0, 1.0, 0.1), n_init_experts=1)
    chain = PriorChain(x, np.zeros(n), settings, 0)
    tables = []
    for sweep in range(1200):
        chain.sweep()
        if sweep >= 100:
            tables.append(len(chain.experts))
    np.testing.assert_allclose(np.mean(tables), (alpha / (alpha + np.arange(n))).sum(), rtol=0.05)


def test_infinite_gp_experts_occupation_counts_the_other_rows():
    x = np.random.default_rng(0).standard_normal((12, 2))
    chain = gp_chain.GPChain(x, np.zeros(12), gp_settings(width=0.5), 0)
    near = chain._near(chain.width)
    np.testing.assert_allclose(near.sum(1), 1.0)
    np.testing.assert_array_equal(np.diag(near), 0.0)
    kernel = np.exp(-0.5 * (((x[:, None] - x) / 0.5) ** 2).sum(2))
    np.fill_diagonal(kernel, 0.0)
    np.testing.assert_allclose(near, kernel / kernel.sum(1, keepdims=True))


def test_infinite_gp_experts_tell_the_sides_of_a_step():
    x, y, left = step_with_two_noises(0)
    model = DirichletProcessMixtureOfExpertsRegressor(n_burn=40, n_samples=25, random_state=0).fit(x, y)
    together = model.coclustering_
    assert together[left[:, None] == left].mean() > 0.8
    assert together[np.ix_(left, ~left)].mean() < 0.3
    new_x, new_y, _ = step_with_two_noises(1, n=200)
    single = GaussianProcessRegressor(ConstantKernel() * RBF(), alpha=0.05, normalize_y=True).fit(x, y)
    mean, std = single.predict(new_x, return_std=True)
    alone = stats.norm(mean, np.sqrt(std**2 + 0.05 * y.var())).logpdf(new_y).mean()
    assert model.log_prob(new_x, new_y).mean() > alone + 0.2
    low, middle, high = model.predict_quantiles(new_x, (0.05, 0.5, 0.95)).T
    assert 0.8 < ((new_y > low) & (new_y < high)).mean() < 0.99
    density = model.predict_density(np.repeat(new_x[:1], 4000, 0), np.linspace(-6, 8, 4000))
    np.testing.assert_allclose(density.sum() * 14 / 4000, 1.0, rtol=1e-2)
    draws = model.sample(np.repeat(new_x[:1], 4000, 0), random_state=0)
    mean, std = model.predict(new_x[:1], return_std=True)
    np.testing.assert_allclose([draws.mean(), draws.std()], [mean[0], std[0]], atol=0.1)
    found = model.diagnostics()["n_experts"]
    assert found["effective_sample_size"] > 0
    assert found["r_hat"] > 0.9
    assert middle.shape == (200,)


def test_dp_multinomial_logit_solves_what_one_logit_cannot():
    x, y = xor(0, n=200)
    model = DirichletProcessMixtureOfExpertsClassifier(n_burn=40, n_samples=20, random_state=0).fit(x, y)
    new_x, new_y = xor(1, n=500)
    assert model.score(new_x, new_y) > 0.9
    assert LogisticRegression().fit(x, y).score(new_x, new_y) < 0.65
    assert set(model.diagnostics()) == {"n_experts", "concentration", "log_likelihood"}


def test_dp_multinomial_logit_one_component_is_a_bayesian_logit():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2))
    y = np.array(["a", "b", "c"])[(x @ [[2.0, -1, 0], [0, 1, -2]] + rng.gumbel(size=(200, 3))).argmax(1)]
    model = DirichletProcessMixtureOfExpertsClassifier(
        concentration=1e-12, n_init_experts=1, n_burn=20, n_samples=60, n_chains=1, random_state=0
    ).fit(x, y)
    assert (model.n_experts_trace_ == 1).all()
    scales = np.mean([draw.scales for draw in model.samples_], axis=0)
    standard = (x - x.mean(0)) / x.std(0)
    ridge = LogisticRegression(C=scales[1], tol=1e-8).fit(standard, y)  # the same normal prior on the slopes
    assert np.abs(model.predict_proba(x) - ridge.predict_proba(standard)).max() < 0.05
    assert np.abs(model.predict_proba(x) - ridge.predict_proba(standard)).mean() < 0.03


def test_dp_multinomial_logit_density_is_that_of_a_diagonal_gaussian_gate():
    rng = np.random.RandomState(0)
    x, target = rng.standard_normal((40, 3)), rng.randint(0, 3, 40)
    parts = logit_chain.draw_components(4, 3, 3, np.ones(2), rng)
    weight = rng.dirichlet(np.ones(4))
    params = {
        "log_weight": np.log(weight),
        "mean": parts.mean,
        "covariance": np.exp(parts.log_variance)[:, :, None] * np.eye(3),
    }
    gate = GaussianGate("diag").log_weight(params, x)
    logits = np.einsum("tp,kcp->tkc", np.column_stack([np.ones(40), x]), parts.coef)
    by_class = logits - np.logaddexp.reduce(logits, axis=2, keepdims=True)
    chain = logit_chain.LogitChain(x, target, 3, logit_chain.Settings(5, None, 1), 0)
    joint = np.log(weight) + chain.log_densities(x, target, parts)
    np.testing.assert_allclose(joint, gate + by_class[np.arange(40), :, target], atol=1e-10)


class PriorLogitChain(logit_chain.LogitChain):
    """A chain that does not look at the data."""

    def log_densities(self, x, target, components):
        return np.zeros((len(x), len(components.mean)))

    def _component_step(self, j):
        pass


def test_dp_multinomial_logit_without_data_is_the_chinese_restaurant():
    n, gamma = 15, 1.5
    rng = np.random.default_rng(0)
    settings = logit_chain.Settings(5, gamma, 1)
    chain = PriorLogitChain(rng.standard_normal((n, 1)), rng.integers(0, 2, n), 2, settings, 0)
    tables = []
    for sweep in range(1200):
        chain._labels()
        if sweep >= 100:
            tables.append(len(chain.components.mean))
    np.testing.assert_allclose(np.mean(tables), (gamma / (gamma + np.arange(n))).sum(), rtol=0.05)


def test_the_seed_decides_and_progress_is_printed(capsys):
    x, y, _ = step_with_two_noises(0, n=30)
    short = {"n_burn": 8, "n_samples": 2, "n_chains": 1, "random_state": 3}
    fits = [DirichletProcessMixtureOfExpertsRegressor(verbose=1, **short).fit(x, y) for _ in range(2)]
    np.testing.assert_array_equal(fits[0].predict(x), fits[1].predict(x))
    assert "chain 0, sweep 10/12: " in capsys.readouterr().out
    labels = np.where(y > 1, "up", "down")
    both = [DirichletProcessMixtureOfExpertsClassifier(**short).fit(x, labels) for _ in range(2)]
    np.testing.assert_array_equal(both[0].predict_proba(x), both[1].predict_proba(x))


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (DirichletProcessMixtureOfExpertsRegressor(n_samples=0), "n_samples=0"),
        (DirichletProcessMixtureOfExpertsRegressor(alpha=-1.0), "must be above 0"),
        (DirichletProcessMixtureOfExpertsRegressor(hyperparameters=(1.0, 0.0, 1.0)), "must be above 0"),
        (DirichletProcessMixtureOfExpertsClassifier(n_burn=-1), "n_burn=-1"),
        (DirichletProcessMixtureOfExpertsClassifier(concentration=0.0), "must be above 0"),
    ],
)
def test_a_bad_option_is_refused(estimator, message):
    x, y = xor(0, n=20)
    with pytest.raises(ValueError, match=message):
        estimator.fit(x, y)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "estimator",
    [
        DirichletProcessMixtureOfExpertsRegressor(n_burn=5, n_samples=3, thin=1, n_chains=1),
        DirichletProcessMixtureOfExpertsClassifier(n_burn=10, n_samples=5, n_chains=1),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_scikit_learn_finds_no_fault(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, on_fail=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"] == []
