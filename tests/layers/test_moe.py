"""The layer joins its parts, counts them and keeps shapes."""

import pytest
import torch
from torch.testing import assert_close

import moestro
from moestro.experts import FeedForward, make_experts
from moestro.layers import MoE
from moestro.routers import Linear, TokenChoice, TopK, softmax, softmax_over_selected
from moestro.routing import Context


def router(num_experts: int = 4, k: int = 2) -> TokenChoice:
    return TokenChoice(Linear(8, num_experts), TopK(k), softmax, softmax_over_selected)


def test_parts_are_attributes_and_forward_is_route_then_run() -> None:
    shared = FeedForward(8, 3)
    moe = MoE(router(), make_experts(4, 8, 5), shared)
    assert (moe.shared, moe.router.num_experts, moe.experts.num_experts) == (shared, 4, 4)
    x = torch.randn(2, 3, 8)
    decision = moe.route(x.view(6, 8))
    assert_close(moe(x), moe.run(x.view(6, 8), decision).view(2, 3, 8))
    assert_close(
        moe.run(x.view(6, 8), decision) - shared(x.view(6, 8)), moe.experts.run(x.view(6, 8), decision.routing)
    )


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 3, 4, 8), (0, 8), (2, 0, 8)], ids=str)
def test_any_leading_shape_comes_back(shape: tuple[int, ...]) -> None:
    assert MoE(router(), make_experts(4, 8, 5))(torch.randn(shape)).shape == shape


def test_a_stored_decision_replays() -> None:
    moe = MoE(router(), make_experts(4, 8, 5))
    x = torch.randn(6, 8)
    decision = moe.route(x)
    with torch.no_grad():
        moe.router.scorer.weight.zero_()
    assert torch.equal(moe.run(x, decision), moe.run(x, decision))
    assert not torch.equal(moe.run(x, decision), moe(x))


def test_the_shared_expert_skips_padding() -> None:
    moe = MoE(router(), make_experts(4, 8, 5), FeedForward(8, 3))
    y = moe(torch.randn(3, 8), Context(valid=torch.tensor([True, False, True])))
    assert not y[1].any()
    assert y[0].any()


def test_counts_by_hand() -> None:
    counts = MoE(router(), make_experts(4, 8, 5), FeedForward(8, 3)).parameter_counts()
    assert (counts.router, counts.per_expert, counts.shared) == (32, 120, 72)
    assert counts.total == 32 + 4 * 120 + 72
    assert counts.active == 32 + 2 * 120 + 72


def test_disagreeing_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="among 4 experts but the bank holds 3"):
        MoE(router(4), make_experts(3, 8, 5))


def test_build_names_what_is_wrong() -> None:
    sizes = {"width": 8, "hidden": 4, "num_experts": 4}
    with pytest.raises(ValueError, match=r"unknown method 'swich' \(did you mean 'switch'\?\); there are"):
        moestro.build("swich", **sizes)
    with pytest.raises(ValueError, match=r"no option 'capacity' .*; it takes capacity_factor: float = 1.25"):
        moestro.build("switch", **sizes, capacity=2)
    with pytest.raises(ValueError, match=r"option top_k='two'.*expected int"):
        moestro.build("mixtral", **sizes, top_k="two")
    with pytest.raises(ValueError, match="top_k=9 but there are 4 experts; pass 1 <= top_k <= 4 or add experts"):
        moestro.build("mixtral", **sizes, top_k=9)
    with pytest.raises(ValueError, match="hash-layers needs the option 'vocab_size'"):
        moestro.build("hash-layers", **sizes)
    with pytest.raises(ValueError, match=r"expected .*'random'"):
        moestro.build("gshard-top2", **sizes, second="sometimes")
