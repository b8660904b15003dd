"""Mixtral's gating against its equations: Jiang et al. 2024."""

import pytest
import torch
from oracles import papers
from oracles.harness import build, check_layer, random_case
from torch.testing import assert_close

import moestro
from moestro.routing import Context


@pytest.mark.parametrize("seed", range(42))
def test_mixtral_follows_its_equations(seed):
    case = random_case(seed)
    top_k = 1 + seed % min(case.num_experts, 4)
    layer = build("mixtral", case, top_k=top_k)
    router = layer.router.scorer.weight

    def slow(twin, x, _):
        return papers.mixtral(x, twin(router), twin.experts, top_k, case.valid_list)

    check_layer(layer, case, slow)


def test_mixtral_softmax_then_renormalise_is_the_same():
    layer = moestro.build("mixtral", width=6, hidden=3, num_experts=5).double()
    layer.router.scorer.weight.data.normal_()
    decision = layer.route(torch.randn(20, 6, dtype=torch.float64))
    best, index = decision.probs.topk(2)
    expected = torch.zeros(20, 5, dtype=torch.float64).scatter(1, index, best / best.sum(1, keepdim=True))
    assert_close(decision.routing.combine_matrix(), expected, rtol=0, atol=1e-6)


def test_mixtral_parameter_counts_are_the_published_ones():
    """46.7 billion in all, 12.9 billion active: 32 layers of 8 experts, grouped-query attention, two embeddings."""
    with torch.device("meta"):
        counts = moestro.build("mixtral", width=4096, hidden=14336, num_experts=8).parameter_counts()
    attention, norms = 2 * 4096 * 4096 + 2 * 4096 * 1024, 2 * 4096
    around = 32 * (attention + norms) + 4096 + 2 * 32000 * 4096
    assert counts.total * 32 + around == 46_702_792_704
    assert counts.active * 32 + around == 12_879_925_248


def test_mixtral_loss_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layer = moestro.build("mixtral", width=6, hidden=3, num_experts=5, top_k=3).double()
    layer.router.scorer.weight.data.normal_()
    x, valid = torch.randn(8, 6, dtype=torch.float64), torch.rand(8) < 0.7
    decision = layer.route(x, Context(valid=valid))
    theirs = modeling.load_balancing_loss_func((decision.logits,), 5, 3, attention_mask=valid.view(1, 8).double())
    assert_close(layer.losses["balance"][1](decision), theirs.double(), rtol=0, atol=1e-6)  # theirs is in float32


def test_mixtral_drops_nobody():
    layer, x = moestro.build("mixtral", width=6, hidden=3, num_experts=5), torch.ones(50, 6)
    assert layer.route(x).routing.load().sort().values.tolist() == [0, 0, 0, 50, 50]
