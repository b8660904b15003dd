"""Choosing tokens: greedy, by temperature, from the nucleus."""

import pytest
import torch
from torch.testing import assert_close

from moestro.inference import Sampler


def frequencies(sampler, logits, draws=4000):
    return torch.bincount(torch.tensor([sampler(logits) for _ in range(draws)]), minlength=len(logits)) / draws


def test_greedy_takes_the_highest_and_the_first_of_equals():
    assert Sampler()(torch.tensor([0.0, 3.0, 1.0, 3.0])) == 1


def test_draws_follow_the_tempered_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0])
    assert_close(frequencies(Sampler(2.0), logits), torch.softmax(logits / 2, -1), atol=0.03, rtol=0)


def test_the_nucleus_is_the_smallest_set_that_holds_top_p():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert_close(
        frequencies(Sampler(1.0, top_p=0.6), logits), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03, rtol=0
    )
    assert frequencies(Sampler(1.0, top_p=1e-6), logits, draws=20)[1] == 1


def test_the_seed_decides():
    logits = torch.randn(50)
    first, second, other = ([sampler(logits) for _ in range(20)] for sampler in map(sampler_of, (1, 1, 2)))
    assert first == second != other


def sampler_of(seed):
    return Sampler(1.0, seed=seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "pass 0 for greedy"),
        ({"temperature": float("nan")}, "pass 0 for greedy"),
        ({"top_p": 0}, "above 0 and at most 1"),
        ({"top_p": 1.5}, "above 0 and at most 1"),
    ],
)
def test_senseless_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)
