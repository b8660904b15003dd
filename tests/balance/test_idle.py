"""A balance that cannot act is refused where someone asks for it."""

import pytest
import torch

import moestro
from moestro.balance import GroupBalance, LoadTimesProbability, RoutingLog, SequenceBalance, z_loss
from moestro.balance.idle import idle_reason
from moestro.balance.losses import Importance

SIZES = {"width": 6, "hidden": 4}


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("mixtral", {"num_experts": 2, "balance": 0.1}, "every token takes all 2 experts"),
        ("olmoe", {"num_experts": 4, "top_k": 4, "balance": 0.1}, "every token takes all 4 experts"),
        ("deepseek-v3", {"num_experts": 3, "top_k": 3, "sequence_balance": 0.1}, "every token takes all 3 experts"),
        ("deepseek-v3", {"num_experts": 3, "top_k": 3, "bias_rate": 0.1}, "a bias changes no choice"),
        ("switch", {"num_experts": 1, "balance": 0.1}, "a single expert"),
        ("smile", {"num_experts": 4, "node_balance": 0.1}, "a single group"),
    ],
)
def test_a_balance_that_cannot_act_is_refused(method, options, reason):
    with pytest.raises(ValueError, match=rf"{method}: option .* cannot act: .*{reason}"):
        moestro.build(method, **SIZES, **options)


@pytest.mark.parametrize("num_experts", [1, 2])
def test_defaults_and_coefficients_of_zero_are_not(num_experts):
    moestro.build("mixtral", **SIZES, num_experts=2)
    moestro.build("switch", **SIZES, num_experts=num_experts, balance=0.0)


def test_what_is_called_idle_has_no_gradient():
    moe = moestro.build("olmoe", **SIZES, num_experts=4, top_k=4).double()
    torch.nn.init.normal_(moe.router.scorer.weight)
    log = RoutingLog(moe)
    with log.recording():
        moe(torch.randn(9, 6, dtype=torch.float64))
    (decision,) = log.decisions[""]
    losses = [LoadTimesProbability(c) for c in ("switch", "megatron", "transformers")]
    for loss in (*losses, SequenceBalance(), GroupBalance(2), GroupBalance(1), Importance(), z_loss):
        (gradient,) = torch.autograd.grad(loss(decision), moe.router.scorer.weight, retain_graph=True)
        idle = idle_reason(loss, moe.router) is not None
        assert idle == bool(gradient.abs().max() < 1e-12), loss
