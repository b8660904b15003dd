"""Quantile balancing: the bias that would give every expert its share."""

import copy

import pytest
from oracles.entry import entry
from oracles.routes import lively, tokens
from torch.testing import assert_close

from moestro.balance import RoutingLog


@entry("quantile-balancing")
def test_quantile_balancing_gives_an_expert_its_share_at_once(method):
    """Two experts, one choice: the bias difference is the median of the score differences."""
    moe, x = lively(method, num_experts=2, top_k=1, rate=1.0), tokens(101)
    log = RoutingLog(moe)
    with log.recording():
        moe(x)
    log.update_controllers()
    probs = moe.route(x).probs.detach()
    median = (probs[:, 1] - probs[:, 0]).median()
    # both experts move, so that the difference is twice the median
    assert_close((moe.router.select.bias[0] - moe.router.select.bias[1]).double(), 2 * median, rtol=1e-5, atol=1e-6)


@entry("quantile-balancing")
def test_quantile_balancing_evens_a_fixed_router_in_few_steps(method):
    moe, x = lively(method, top_k=2), tokens(800)
    before = moe.route(x).routing.load()
    log = RoutingLog(moe)
    for _ in range(20):
        with log.recording():
            moe(x)
        log.update_controllers()
    load = moe.route(x).routing.load()
    assert int(before.max()) > 250
    assert int(load.max()) < 1.1 * 200
    assert int(load.min()) > 0.9 * 200
    twin = copy.deepcopy(moe)
    assert twin.controllers[0].select is twin.router.select
    assert float(moe.router.select.bias.mean().abs()) < 1e-6


@entry("quantile-balancing")
def test_quantile_balancing_refuses_what_cannot_act(method):
    with pytest.raises(ValueError, match="takes all 4 experts"):
        lively(method, num_experts=4, top_k=4)
    with pytest.raises(ValueError, match=r"rate=2\.0 must be above 0 and at most 1"):
        lively(method, rate=2.0)
