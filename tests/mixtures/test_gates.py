"""Gates that describe the inputs: exponential families, subspaces, kernels."""

import numpy as np
import pytest
from oracles.planted_mixtures import crossing_lines
from scipy import stats
from sklearn.decomposition import PCA

from moestro.mixtures import MixtureOfExpertsRegressor
from moestro.mixtures.gates import ConstantGate, ExponentialFamilyGate, GaussianGate, KernelGate

FAMILIES = ("gaussian", "bernoulli", "categorical", "poisson", "exponential", "gamma")


def mixed_columns(seed, n=120):
    """One column of each family, two groups that differ in all, and a line per group."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n)
    x = np.column_stack(
        [
            rng.normal([3.0, -1.0], [1.0, 2.0], (n, 2))[np.arange(n), label],
            rng.random(n) < np.array([0.2, 0.7])[label],
            (rng.random(n)[:, None] > np.array([[0.2, 0.5], [0.6, 0.8]])[label]).sum(1),
            rng.poisson(np.array([1.0, 4.0])[label]),
            rng.exponential(np.array([1.0, 3.0])[label]),
            rng.gamma(np.array([2.0, 5.0])[label], np.array([1.0, 0.2])[label]),
        ]
    ).astype(float)
    return x, np.where(label == 0, x[:, 0], -2 - x[:, 0]) + 0.3 * rng.standard_normal(n), label


def log_odds_are_linear(fitted, slope, x):
    share = fitted.gate_proba(x)
    gap = np.log(share[:, 0] / share[:, 1])
    plane = x @ slope
    np.testing.assert_allclose(gap - gap[0], plane - plane[0], atol=1e-9)


def test_expfam_gate_of_zeros_and_ones_is_a_linear_softmax():
    rng = np.random.default_rng(0)
    x = (rng.random((300, 3)) < [0.3, 0.5, 0.8]).astype(float)
    y = np.where(x[:, 0] + x[:, 1] > 1, 5.0, -5.0) + rng.standard_normal(300)
    fitted = MixtureOfExpertsRegressor(2, gate="exponential-family", expert="constant", random_state=0).fit(x, y)
    assert fitted.gate_families_ == ["bernoulli"] * 3
    odds = [np.log(p[:, 0] / (1 - p[:, 0])) for p in fitted.gate_columns_]
    log_odds_are_linear(fitted, np.array([each[0] - each[1] for each in odds]), x)


def test_expfam_gate_of_counts_is_a_linear_softmax_with_slopes_log_rate():
    rng = np.random.default_rng(0)
    x = rng.poisson([3.0, 8.0], (300, 2)).astype(float)
    y = x[:, 0] - x[:, 1] + rng.standard_normal(300)
    gate = ExponentialFamilyGate("poisson")
    fitted = MixtureOfExpertsRegressor(2, gate=gate, expert="constant", random_state=0).fit(x, y)
    rates = np.column_stack([column[:, 0] for column in fitted.gate_columns_])
    log_odds_are_linear(fitted, np.log(rates[0] / rates[1]), x)


def test_expfam_gate_of_normal_columns_is_the_diagonal_gaussian_gate():
    x, y = crossing_lines(0, n=200)
    x = np.column_stack([1e3 + 50 * x[:, 0], x[:, 0] ** 2 + np.random.default_rng(0).standard_normal(200)])
    fits = [
        MixtureOfExpertsRegressor(2, gate=gate, random_state=0, tol=1e-9, max_iter=5000).fit(x, y)
        for gate in (ExponentialFamilyGate("gaussian"), GaussianGate("diag"))
    ]
    np.testing.assert_allclose(fits[0].loglik_, fits[1].loglik_, rtol=1e-6)
    np.testing.assert_allclose(fits[0].score_samples(x), fits[1].score_samples(x), atol=1e-3)


def test_expfam_gate_densities_are_scipys_and_the_groups_are_found():
    x, y, label = mixed_columns(0, n=300)
    fitted = MixtureOfExpertsRegressor(2, gate=ExponentialFamilyGate(FAMILIES), random_state=0).fit(x, y)
    found = fitted.assign(x, y)
    assert max((found == label).mean(), (found != label).mean()) > 0.95
    normal, coin, face, count, wait, positive = fitted.gate_columns_
    by_hand = np.empty((300, 2))
    for i in range(2):
        by_hand[:, i] = (
            fitted.mixture_.gate_params["log_weight"][i]
            + stats.norm(normal[i, 0], normal[i, 1] ** 0.5).logpdf(x[:, 0])
            + stats.bernoulli(coin[i, 0]).logpmf(x[:, 1])
            + np.log(face[i])[x[:, 2].astype(int)]
            + stats.poisson(count[i, 0]).logpmf(x[:, 3])
            + stats.expon(scale=wait[i, 0]).logpdf(x[:, 4])
            + stats.gamma(positive[i, 1], scale=positive[i, 0] / positive[i, 1]).logpdf(x[:, 5])
        )
    np.testing.assert_allclose(fitted.score_samples(x), np.logaddexp.reduce(by_hand, axis=1), atol=1e-9)
    assert fitted.n_parameters_ == 1 + 2 * (2 + 1 + 2 + 1 + 1 + 2) + 2 * (6 + 1 + 1)


def test_expfam_gate_the_joint_likelihood_never_falls():
    for seed in range(10):
        x, y, _ = mixed_columns(seed, n=60)
        weight = np.random.default_rng(seed).integers(0, 3, 60) + 0.5
        model = MixtureOfExpertsRegressor(3, gate=ExponentialFamilyGate(FAMILIES), n_init=1, max_iter=60, tol=0)
        with pytest.warns(UserWarning, match="did not converge"):
            path = model.fit(x, y, weight).loglik_path_
        assert (np.diff(path) / (1 + np.abs(path[:-1]))).min() > -1e-9


@pytest.mark.parametrize("gate", [ExponentialFamilyGate(FAMILIES), GaussianGate("rank-1"), GaussianGate("rank-2")])
def test_gate_gradients_are_those_of_finite_differences(gate):
    x, y, _ = mixed_columns(1)
    fitted = MixtureOfExpertsRegressor(2, gate=gate, n_init=1, tol=1e-2, random_state=0).fit(x, y)
    rows, mixture = fitted._rows_of(x, y, None), fitted.mixture_
    slope, center = mixture.gradient(rows), mixture.free()
    assert len(slope) == len(center) == fitted.n_parameters_
    np.testing.assert_allclose(mixture.restore(center).objective(rows), mixture.objective(rows), rtol=1e-10)
    for k in range(len(center)):
        step = np.zeros_like(center)
        step[k] = 1e-5
        rise = mixture.restore(center + step).objective(rows) - mixture.restore(center - step).objective(rows)
        np.testing.assert_allclose(slope[k], rise / 2e-5, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("families", "column", "message"),
    [
        ("binomial", 0, "pass one of gaussian, bernoulli"),
        (("gaussian",), 0, "for 6 columns"),
        ("bernoulli", 0, "the bernoulli family wants 0 or 1"),
        ("categorical", 0, "the categorical family wants whole numbers from 0"),
        ("poisson", 0, "the poisson family wants counts of 0 and more"),
        ("exponential", 0, "the exponential family wants numbers of 0 and more"),
        ("gamma", 0, "the gamma family wants numbers above 0"),
    ],
)
def test_expfam_gate_refuses_what_a_family_cannot_explain(families, column, message):
    x, y, _ = mixed_columns(0)
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsRegressor(gate=ExponentialFamilyGate(families)).fit(x, y)


def test_a_subspace_gate_with_one_expert_is_probabilistic_pca():
    x, y, _ = mixed_columns(0)
    fitted = MixtureOfExpertsRegressor(1, gate=GaussianGate("rank-2")).fit(x, y)
    standard = fitted.scaling_.x(x)
    theirs = PCA(2).fit(standard)
    n, q = standard.shape
    values = np.linalg.eigvalsh(np.cov(standard.T, bias=True))[::-1]
    rest = values[2:].mean()
    expected = -n / 2 * (q * np.log(2 * np.pi) + np.log(values[:2]).sum() + (q - 2) * np.log(rest) + q)
    volume = n * np.log(fitted.scaling_.x_scale).sum()
    np.testing.assert_allclose(fitted.score_samples(x).sum() + volume, expected, rtol=1e-9)
    np.testing.assert_allclose(theirs.score(standard) * n, expected, rtol=1e-3)  # scikit-learn divides by n - 1


def test_a_reconstruction_gate_sends_rows_to_the_subspace_that_reconstructs_them():
    rng = np.random.default_rng(0)
    lines = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, -1.0]])
    label = rng.integers(0, 2, 400)
    x = rng.standard_normal((400, 1)) * lines[label] + 0.05 * rng.standard_normal((400, 3))
    y = np.where(label == 0, 3 * x[:, 1], -3 * x[:, 1]) + 0.1 * rng.standard_normal(400)
    fitted = MixtureOfExpertsRegressor(2, gate="reconstruction", random_state=0).fit(x, y)
    unit = lines / np.linalg.norm(lines, axis=1, keepdims=True)
    error = np.stack([((x - np.outer(x @ axis, axis)) ** 2).sum(1) for axis in unit], axis=1)
    clear = np.abs(error[:, 0] - error[:, 1]) > 0.2
    agree = (fitted.gate_proba(x).argmax(1) == error.argmin(1))[clear].mean()
    assert max(agree, 1 - agree) > 0.99
    assert fitted.score(x, y) > 0.95


def test_kernel_gate_is_the_local_line_through_the_shares():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((80, 2)), rng.standard_normal(80)
    for local in ("line", "constant"):
        gate = KernelGate(bandwidth=1.5, local=local)
        fitted = MixtureOfExpertsRegressor(2, gate=gate, n_init=1, tol=1e-2, random_state=0).fit(x, y)
        params, grid = fitted.mixture_.gate_params, rng.standard_normal((5, 2))
        for place, found in zip(fitted.scaling_.x(grid), fitted.gate_proba(grid), strict=True):
            gap = params["at"] - place
            weight = np.maximum(1 - (gap**2).mean(1) / params["radius"] ** 2, 0) ** 3 * params["weight"]
            z = np.column_stack([np.ones(80), gap]) if local == "line" else np.ones((80, 1))
            prior = np.zeros((z.shape[1], z.shape[1]))
            prior[0, 0] = 1e-3
            prior[range(1, len(prior)), range(1, len(prior))] = 1e-3 * params["radius"] ** 2 * (weight.sum() + 1e-3)
            answer = z.T @ (weight[:, None] * params["share"])
            answer[0] += 1e-3 * params["share"].mean(0)
            line = np.clip(np.linalg.solve(z.T @ (weight[:, None] * z) + prior, answer)[0], 1e-6, 1 - 1e-6)
            np.testing.assert_allclose(found, line / line.sum(), atol=1e-8)


def test_kernel_gate_infinitely_wide_is_the_constant_gate():
    x, y = crossing_lines(0, n=200)
    options = {"random_state": 0, "tol": 1e-10, "max_iter": 5000, "n_init": 1}
    wide = MixtureOfExpertsRegressor(2, gate=KernelGate(1e8, local="constant"), **options).fit(x, y)
    constant = MixtureOfExpertsRegressor(2, gate=ConstantGate(), **options).fit(x, y)
    np.testing.assert_allclose(wide.loglik_, constant.loglik_, rtol=1e-6)
    np.testing.assert_allclose(wide.gate_proba(x), constant.gate_proba(x), atol=1e-4)


def test_kernel_gate_follows_a_gate_that_no_softmax_can():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (600, 1))
    middle = np.abs(x[:, 0]) < 0.4
    y = np.where(middle, 2.0, -2.0) + 0.3 * rng.standard_normal(600)
    options = {"expert": "constant", "random_state": 0, "n_init": 2, "tol": 1e-4}
    kernel = MixtureOfExpertsRegressor(2, gate=KernelGate(0.5), **options).fit(x, y)
    softmax = MixtureOfExpertsRegressor(2, **options).fit(x, y)
    assert kernel.score(x, y) > 0.85 > 0.5 > softmax.score(x, y)
    assert kernel.mixture_.gate.climbs is False


def test_kernel_gate_has_no_gradient_and_no_information():
    x, y = crossing_lines(0, n=100)
    with pytest.raises(ValueError, match="needs finitely many numbers"):
        MixtureOfExpertsRegressor(gate="kernel", algorithm="gradient").fit(x, y)
    fitted = MixtureOfExpertsRegressor(gate="kernel", random_state=0, n_init=1, tol=1e-3).fit(x, y)
    with pytest.raises(ValueError, match="pass method='bootstrap'"):
        fitted.standard_errors(x, y)
    with pytest.raises(ValueError, match="local='cubic' must be line or constant"):
        MixtureOfExpertsRegressor(gate=KernelGate(local="cubic")).fit(x, y)
