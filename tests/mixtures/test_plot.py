"""Pictures show what was fitted."""

import numpy as np
import pytest
from oracles.planted_mixtures import crossing_lines

from moestro.mixtures import MixtureOfExpertsRegressor

mpl = pytest.importorskip("matplotlib")
mpl.use("Agg")


@pytest.fixture(scope="module")
def fitted():
    x, y = crossing_lines(0, n=200)
    return MixtureOfExpertsRegressor(branching=(2, 2), random_state=0, tol=1e-4, n_init=1).fit(x, y), x, y


def test_gates_are_drawn_as_they_are(fitted):
    from moestro.mixtures.plot import plot_gates

    model, x, _ = fitted
    lines = plot_gates(model, x).get_lines()
    assert len(lines) == 4
    np.testing.assert_allclose(sum(line.get_ydata() for line in lines), 1.0)


def test_every_picture_is_drawn(fitted, tmp_path):
    from moestro.mixtures import plot

    model, x, y = fitted
    pictures = [
        plot.plot_experts(model, x, y),
        plot.plot_responsibilities(model, x, y),
        plot.plot_log_likelihood(model),
        plot.plot_tree(model, x),
    ]
    for number, ax in enumerate(pictures):
        ax.figure.savefig(tmp_path / f"{number}.png")
    texts = [text.get_text() for text in pictures[3].texts]
    assert len(texts) == 7
    np.testing.assert_allclose(
        sum(float(text.split("\n")[1]) for text in texts if "expert" in text), 1.0, atol=0.02
    )
    np.testing.assert_allclose(pictures[2].get_lines()[0].get_ydata(), model.loglik_path_)
    mpl.pyplot.close("all")
