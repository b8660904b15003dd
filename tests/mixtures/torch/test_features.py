"""Layers of mixtures whose gate and experts read different columns."""

import numpy as np
import pytest
import torch

from moestro.mixtures import MixtureOfExpertsRegressor


@pytest.mark.parametrize("gate", ["softmax", "constant", "exponential-family"])
def test_the_layer_reads_the_same_columns(gate):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 3)) + 2
    chosen = {"gate_features": [2], "expert_features": [0, 1]}
    if gate == "exponential-family":
        x[:, 2] = x[:, 2] > 2
    y = np.where(x[:, 2] > 1, x[:, 0], -x[:, 1]) + 0.1 * rng.standard_normal(200)
    fitted = MixtureOfExpertsRegressor(2, gate=gate, random_state=0, **chosen).fit(x, y)
    layer = fitted.to_moe()
    with torch.no_grad():
        found = layer(torch.from_numpy(x))[:, 0].numpy()
    np.testing.assert_allclose(found, fitted.predict(x), rtol=0, atol=1e-9)


def test_densities_of_some_columns_are_refused():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 2))
    fitted = MixtureOfExpertsRegressor(2, gate="gaussian", gate_features=[0], random_state=0).fit(x, x[:, 1])
    with pytest.raises(ValueError, match="leave out gate_features or fit gate='softmax'"):
        fitted.to_moe()
