"""The number of experts, their labels, and theory on paper."""

import numpy as np
import pytest
from oracles.planted_mixtures import crossing_lines, xor

from moestro.mixtures import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor, align_experts, select_n_experts
from moestro.mixtures.theory import sparse_moe_bound, voronoi_loss


def test_model_selection_bic_finds_the_planted_two():
    for seed in range(2):
        x, y = crossing_lines(seed)
        best, table = select_n_experts(MixtureOfExpertsRegressor(n_init=2, random_state=0), x, y, range(1, 4))
        assert best.n_experts == 2
        assert all(row["icl"] >= row["bic"] for row in table)
        assert not table[1]["on_floor"]


def test_model_selection_by_held_out_rows():
    x, y = crossing_lines(0, n=400)
    best, table = select_n_experts(
        MixtureOfExpertsRegressor(n_init=2, tol=1e-4, random_state=0), x, y, [1, 2], criterion="cv", cv=2
    )
    assert best.n_experts == 2
    assert table[1]["cv"] < table[0]["cv"]


def test_model_selection_half_weights_on_doubled_rows_change_nothing():
    x, y = crossing_lines(0, n=200)
    fitted = MixtureOfExpertsRegressor(random_state=0, tol=1e-4).fit(x, y)
    double = np.repeat(x, 2, 0), np.repeat(y, 2)
    for name in ("aic", "bic", "icl"):
        np.testing.assert_allclose(
            getattr(fitted, name)(*double, sample_weight=np.full(400, 0.5)), getattr(fitted, name)(x, y)
        )


def test_model_selection_avoids_a_fit_on_the_variance_floor():
    x, y = crossing_lines(0, n=60)
    y[x[:, 0] < 0] = 30.0  # a flat line without noise
    best, table = select_n_experts(MixtureOfExpertsRegressor(random_state=0, tol=1e-4), x, y, [1, 2])
    assert table[1]["on_floor"]
    assert table[1]["bic"] < table[0]["bic"]
    assert best.n_experts == 1


@pytest.mark.parametrize("by", ["weight", "intercept", "variance", "coef:0", lambda m: -m.weights_])
def test_identifiability_sorting_changes_no_prediction(by):
    x, y = crossing_lines(0, n=300)
    fitted = MixtureOfExpertsRegressor(3, random_state=0, tol=1e-4).fit(x, y)
    before = fitted.expert_coef_.copy()
    other = fitted.sort_experts(by)
    np.testing.assert_allclose(other.predict(x), fitted.predict(x), atol=1e-12)
    np.testing.assert_allclose(other.log_likelihood(x, y), fitted.log_likelihood(x, y), rtol=1e-12)
    np.testing.assert_array_equal(fitted.expert_coef_, before)
    assert other.gate_intercept_[-1] == 0


def test_identifiability_aligning_undoes_a_permutation():
    x, y = xor(0, n=300)
    fitted = MixtureOfExpertsClassifier(3, random_state=0, tol=1e-4).fit(x, y)
    shuffled = fitted._renumbered(np.array([2, 0, 1]))
    back = align_experts(shuffled, fitted, x, y)
    np.testing.assert_allclose(back.expert_coef_, fitted.expert_coef_)
    np.testing.assert_allclose(back.gate_coef_, fitted.gate_coef_, atol=1e-12)


def test_identifiability_a_tree_keeps_its_leaves():
    x, y = crossing_lines(0, n=100)
    tree = MixtureOfExpertsRegressor(branching=(2, 2), random_state=0, tol=1e-3, n_init=1).fit(x, y)
    with pytest.raises(ValueError, match="leaves of a tree have their places"):
        tree.sort_experts("weight")


def test_identifiability_standard_errors_of_one_expert_are_those_of_least_squares():
    x, y = crossing_lines(0, n=200)
    fitted = MixtureOfExpertsRegressor(1).fit(x, y)
    z = np.hstack([np.ones((200, 1)), x])
    variance = np.mean((y - fitted.predict(x)) ** 2)
    expected = np.sqrt(np.diag(np.linalg.inv(z.T @ z)) * variance)
    errors = fitted.standard_errors(x, y)
    np.testing.assert_allclose(errors["expert_intercept_"][0, 0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(errors["expert_coef_"][0, 0, 0], expected[1], rtol=1e-5)
    np.testing.assert_allclose(errors["expert_variance_"][0, 0], variance * np.sqrt(2 / 200), rtol=1e-5)


def coverage(seeds):
    hits = []
    for seed in seeds:
        x, y = crossing_lines(seed)
        model = MixtureOfExpertsRegressor(2, n_init=2, random_state=0).fit(x, y).sort_experts("coef:0")
        errors = model.standard_errors(x, y)
        hits.append(np.abs(model.expert_coef_[:, 0, 0] - [-2.5, 2.5]) < 1.96 * errors["expert_coef_"][:, 0, 0])
        gate = model.gate_coef_[0, 0] - 3.0
        hits.append([abs(gate) < 1.96 * errors["gate_coef_"][0, 0]] * 2)
    return np.mean(hits)


def test_identifiability_intervals_cover():
    assert coverage(range(10)) > 0.8


@pytest.mark.nightly
def test_identifiability_intervals_cover_95_percent():
    assert 0.9 < coverage(range(200)) < 0.99


def test_summary_shows_estimates_and_errors():
    x, y = crossing_lines(0, n=300)
    fitted = MixtureOfExpertsRegressor(2, random_state=0).fit(x, y)
    text = fitted.summary(x, y)
    assert "2 experts, 8 parameters" in text
    assert "BIC" in text
    assert "std. error" in text
    assert "expert_coef[1, 0, 0]" in fitted.summary()


def test_identifiability_the_bootstrap_agrees_with_the_information():
    x, y = crossing_lines(0, n=600)
    fitted = MixtureOfExpertsRegressor(2, random_state=0).fit(x, y)
    exact = fitted.standard_errors(x, y)
    drawn = fitted.standard_errors(x, y, method="bootstrap", n_resamples=60)
    np.testing.assert_allclose(drawn["expert_coef_"], exact["expert_coef_"], rtol=0.5)
    robust = MixtureOfExpertsRegressor(1, expert="laplace").fit(x, y)
    assert 0 < robust.standard_errors(x, y, method="bootstrap", n_resamples=20)["expert_coef_"][0, 0, 0] < 1
    with pytest.raises(ValueError, match="method='jackknife' is unknown"):
        fitted.standard_errors(x, y, method="jackknife")


def test_kinked_densities_have_no_information_matrix():
    x, y = crossing_lines(0, n=100)
    with pytest.raises(ValueError, match="kinked density"):
        MixtureOfExpertsRegressor(expert="laplace", random_state=0, tol=1e-3).fit(x, y).standard_errors(x, y)


def test_softmax_lse_voronoi_loss_is_blind_to_names():
    rng = np.random.default_rng(0)
    truth = rng.random(3) + 0.1, rng.standard_normal((3, 2)), rng.standard_normal((3, 4))
    order = [2, 0, 1]
    shifted = truth[0][order] * 2.0, truth[1][order] + [1.0, -3.0], truth[2][order]
    assert voronoi_loss(*shifted, *truth) < 1e-12
    half = [0, 0, 1, 2]
    split = truth[0][half] * [0.5, 0.5, 1, 1], truth[1][half], truth[2][half]
    assert voronoi_loss(*split, *truth) < 1e-12
    moved = truth[0], truth[1], truth[2] + 0.1
    assert voronoi_loss(*moved, *truth) > 0.01


def test_sparse_moe_bound_moves_as_it_should():
    base = {"n": 1e6, "n_experts": 64, "k": 2, "natarajan_dim": 100, "rademacher": 0.01}

    def bound(**changes):
        return float(sparse_moe_bound(**{**base, **changes}))

    assert bound(k=1) < bound() < bound(k=4) < bound(k=64)
    assert bound() < bound(natarajan_dim=200)
    assert bound() < bound(rademacher=0.02)
    assert bound() < bound(delta=0.01)
    np.testing.assert_allclose(
        bound(rademacher=0, n=4e6) / bound(rademacher=0), 0.5, rtol=0.05
    )  # n to the -1/2, up to log n
    np.testing.assert_array_equal(sparse_moe_bound(1e6, [4, 8], 1, 10, 0).shape, (2,))
    with pytest.raises(ValueError, match="must lie between 1 and"):
        bound(k=65)
