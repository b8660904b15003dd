"""Random layers decide, weigh, lose and learn exactly as code written straight from the papers."""

import pytest
from oracles.random_layers import CHECKS


@pytest.mark.parametrize("method", CHECKS)
def test_random_layers_follow_the_paper(method):
    for seed in range(30):
        CHECKS[method](seed)


@pytest.mark.nightly
@pytest.mark.parametrize("method", CHECKS)
def test_a_thousand_random_layers_follow_the_paper(method):
    for seed in range(1000):
        CHECKS[method](seed)
