"""Noisy top-k gating against its equations: Shazeer et al. 2017."""

import pytest
import torch
from oracles import papers
from oracles.harness import build, check_layer, random_case
from torch.testing import assert_close

import moestro
from moestro.balance import cv_squared, load_cv_squared
from moestro.routing import Decision, SparseRouting


def slow_shazeer(layer, case, top_k, draws):
    router, noise = layer.router.scorer.weight, layer.router.noise.weight
    return lambda twin, x, _: papers.shazeer(
        x, twin(router), twin(noise), twin.experts, top_k, case.valid_list, draws
    )


@pytest.mark.parametrize("seed", range(42))
def test_shazeer_noisy_topk_follows_its_equations_in_evaluation(seed):
    case = random_case(seed)
    top_k = 1 + seed % case.num_experts
    layer = build("shazeer-noisy-topk", case, top_k=top_k).eval()
    check_layer(layer, case, slow_shazeer(layer, case, top_k, None))


@pytest.mark.parametrize("seed", range(42))
def test_shazeer_noisy_topk_follows_its_equations_in_training(seed):
    case = random_case(seed)
    top_k = 1 + seed % case.num_experts
    layer = build("shazeer-noisy-topk", case, top_k=top_k).train()
    torch.manual_seed(seed)
    draws = torch.randn(case.num_tokens, case.num_experts, dtype=torch.float64)
    torch.manual_seed(seed)
    decision = check_layer(layer, case, slow_shazeer(layer, case, top_k, draws))
    assert_close(decision.notes["noisy_logits"], decision.logits + draws * decision.notes["noise_std"])


def chances_of(decision, top_k, num_experts):
    """Chance of every token and expert to be chosen, by the equation."""
    noisy, std, clean = decision.notes["noisy_logits"], decision.notes["noise_std"], decision.logits
    rows = []
    for t in range(len(noisy)):
        row = []
        for i in range(num_experts):
            others = [float(noisy[t, j]) for j in range(num_experts) if j != i]
            kth = sorted(others, reverse=True)[top_k - 1]
            row.append(papers.normal_cdf((clean[t, i] - kth) / std[t, i]))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@torch.no_grad()
def test_shazeer_noisy_topk_starts_with_chance_k_over_e():
    layer = moestro.build("shazeer-noisy-topk", width=3, hidden=2, num_experts=5, top_k=2).double().train()
    assert float(layer.router.scorer.weight.abs().sum() + layer.router.noise.weight.abs().sum()) == 0
    decision = layer.route(torch.randn(1500, 3, dtype=torch.float64))
    chance = chances_of(decision, 2, 5)
    assert_close(chance.mean(0), torch.full((5,), 2 / 5, dtype=torch.float64), rtol=0, atol=0.05)
    assert float(chance.sum()) == pytest.approx(2 * 1500, rel=0.05)
    assert_close(load_cv_squared(decision), papers.squared_variation(list(chance.sum(0))))


def test_shazeer_noisy_topk_load_becomes_the_count_without_noise():
    clean = torch.randn(9, 4, dtype=torch.float64)
    choice = clean.topk(2).indices
    routing = SparseRouting.from_choice(choice, torch.ones(9, 2), 4)
    notes = {"choice": choice, "noisy_logits": clean, "noise_std": torch.full_like(clean, 1e-9)}
    count = routing.load().double()
    assert_close(load_cv_squared(Decision(routing, clean, None, notes)), cv_squared(count))


def test_shazeer_noisy_topk_weights_sum_to_one_on_exactly_k():
    layer = moestro.build("shazeer-noisy-topk", width=3, hidden=2, num_experts=7, top_k=3).double()
    layer.router.scorer.weight.data.normal_()
    for mode in (True, False):
        combine = layer.train(mode).route(torch.randn(30, 3, dtype=torch.float64)).routing.combine_matrix()
        assert_close(combine.sum(1), torch.ones(30, dtype=torch.float64))
        assert combine.gt(0).sum(1).tolist() == [3] * 30


def test_shazeer_noisy_topk_variation_of_a_constant_is_zero():
    assert float(cv_squared(torch.full((6,), 3.7))) == 0


def test_shazeer_noisy_topk_has_no_noise_in_evaluation():
    layer = moestro.build("shazeer-noisy-topk", width=3, hidden=2, num_experts=5, top_k=2).eval()
    decision = layer.route(torch.randn(4, 3))
    assert "noisy_logits" not in decision.notes
    assert decision.notes["choice"].tolist() == [[0, 1]] * 4  # zero weights: all tie
