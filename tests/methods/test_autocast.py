"""Every method runs under autocast, as training in bfloat16 does: outputs and gradients are finite."""

import pytest
import torch

import moestro
from moestro.balance import RoutingLog
from moestro.routing import Context

NEEDED = {"vocab_size": 32, "num_domains": 2}


@pytest.mark.parametrize("name", moestro.all_methods())
def test_every_method_runs_under_autocast(name):
    options = {key: value for key, value in NEEDED.items() if key in moestro.all_methods()[name].options}
    moe = moestro.build(name, width=16, hidden=8, num_experts=16, **options)
    x = torch.randn(2, 16, 16, requires_grad=True)
    facts = Context(token_ids=torch.arange(32) % 32, domain=torch.arange(32) % 2)
    log = RoutingLog(moe)
    with log.recording(), torch.autocast("cpu", torch.bfloat16):
        y = moe(x, facts)
    (y.float().square().mean() + log.auxiliary_loss()).backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert all(p.grad.isfinite().all() for p in moe.parameters() if p.grad is not None)
