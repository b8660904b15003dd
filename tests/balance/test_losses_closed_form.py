"""Losses at points where their value is known on paper."""

import math

import pytest
import torch
from oracles import papers
from torch.testing import assert_close

from moestro.balance import (
    LoadTimesProbability,
    SequenceBalance,
    cv_squared,
    importance_cv_squared,
    load_cv_squared,
    load_times_probability,
    z_loss,
)
from moestro.routing import Decision, SparseRouting

CONVENTIONS = ["switch", "megatron", "transformers"]
each_convention = pytest.mark.parametrize("convention", CONVENTIONS)


def decision_of(probs, choice, **notes):
    """A decision with these probabilities `[tokens, experts]` and choices `[tokens, k]`."""
    routing = SparseRouting.from_choice(choice, probs.gather(1, choice), probs.shape[1])
    return Decision(routing, probs.log(), probs, {"choice": choice, **notes})


def even_choice(num_tokens, num_experts, k):
    """Token t takes experts t, t + 1, ... modulo E: even whenever E divides the tokens."""
    return (torch.arange(num_tokens).unsqueeze(1) + torch.arange(k)) % num_experts


def number(value):
    return torch.tensor(float(value), dtype=torch.float64)


def optimum(convention, k):
    return number(k if convention == "transformers" else 1)


@pytest.mark.parametrize("k", [1, 2, 3])
@each_convention
def test_balance_is_one_or_k_when_probabilities_are_uniform_whatever_the_load(convention, k):
    uniform = torch.full((8, 4), 0.25, dtype=torch.float64)
    for choice in (even_choice(8, 4, k), torch.arange(k).expand(8, k)):
        value = load_times_probability(decision_of(uniform, choice), convention)
        assert_close(value, optimum(convention, k))


@pytest.mark.parametrize("k", [1, 2])
@each_convention
def test_balance_is_one_or_k_when_the_load_is_even_whatever_the_probabilities(convention, k):
    probs = torch.rand(8, 4, dtype=torch.float64).softmax(1)
    value = load_times_probability(decision_of(probs, even_choice(8, 4, k)), convention)
    assert_close(value, optimum(convention, k))


@each_convention
def test_balance_is_the_number_of_experts_when_one_takes_all(convention):
    probs = torch.tensor([[1.0, 0, 0, 0, 0]], dtype=torch.float64).expand(6, 5)
    choice = torch.zeros(6, 1, dtype=torch.long)
    assert_close(load_times_probability(decision_of(probs, choice), convention), number(5))


def test_balance_may_fall_below_one_when_load_and_probability_disagree():
    probs = torch.tensor([[0.51, 0.49, 0.0], [0.0, 0.49, 0.51]], dtype=torch.float64)
    choice = torch.tensor([[0], [2]])
    expected = 3 * (0.5 * 0.255 + 0.5 * 0.255)
    assert_close(load_times_probability(decision_of(probs, choice)), number(expected))


@pytest.mark.parametrize("seed", range(12))
def test_conventions_convert_by_the_factor_k_and_agree_with_the_loop(seed):
    num_experts, k = 2 + seed % 6, 1 + seed % 2
    probs = torch.randn(seed, num_experts, dtype=torch.float64).softmax(1)
    choice, valid = probs.topk(k).indices, torch.rand(seed) < 0.7
    decision = decision_of(probs, choice, valid=valid)
    value = {name: load_times_probability(decision, name) for name in CONVENTIONS}
    assert_close(value["transformers"], k * value["megatron"], rtol=1e-14, atol=0)
    first, every = choice[:, :1].tolist(), choice.tolist()
    loop = papers.count_times_probability
    rows = list(probs)
    assert_close(value["switch"], loop(rows, first, valid.tolist(), num_experts, 1), rtol=1e-12, atol=1e-12)
    assert_close(value["megatron"], loop(rows, every, valid.tolist(), num_experts, k), rtol=1e-12, atol=1e-12)
    assert_close(value["transformers"], loop(rows, every, valid.tolist(), num_experts, 1), rtol=1e-12, atol=1e-12)
    if k == 1:
        assert_close(value["switch"], value["megatron"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("convention", "counts"), [("switch", [3, 1, 0]), ("megatron", [2, 1, 1]), ("transformers", [4, 2, 2])]
)
def test_balance_gradient_treats_counts_as_constants(convention, counts):
    """d loss / d p[t, e] = E f_e / T."""
    probs = torch.full((4, 3), 1 / 3, dtype=torch.float64, requires_grad=True)
    choice = torch.tensor([[0, 1], [0, 2], [0, 2], [1, 0]])
    load_times_probability(decision_of(probs, choice), convention).backward()
    share = 3 / 4 * torch.tensor(counts, dtype=torch.float64) / 4
    assert_close(probs.grad, share.expand(4, 3))


@each_convention
def test_balance_counts_what_was_chosen_not_what_was_kept(convention):
    probs = torch.rand(6, 3, dtype=torch.float64).softmax(1)
    choice = probs.topk(2).indices
    kept = torch.zeros(6, 2, dtype=torch.bool)
    routing = SparseRouting.from_choice(choice, probs.gather(1, choice), 3, kept)
    dropped = Decision(routing, None, probs, {"choice": choice, "kept": kept})
    assert_close(
        load_times_probability(dropped, convention), load_times_probability(decision_of(probs, choice), convention)
    )


def test_named_convention_is_the_function():
    probs = torch.rand(6, 3, dtype=torch.float64).softmax(1)
    decision = decision_of(probs, probs.topk(2).indices)
    for convention in CONVENTIONS:
        assert LoadTimesProbability(convention)(decision) == load_times_probability(decision, convention)
    with pytest.raises(ValueError, match="megatron"):
        LoadTimesProbability("huggingface")


def test_sequence_balance_is_one_at_uniform_and_e_over_k_at_collapse():
    uniform = torch.full((6, 4), 0.3, dtype=torch.float64)  # sigmoid scores need not sum to one
    assert_close(SequenceBalance()(decision_of(uniform, even_choice(6, 4, 2))), number(1))
    collapsed = torch.tensor([[0.8, 0.8, 0, 0]], dtype=torch.float64).expand(6, 4)
    assert_close(SequenceBalance()(decision_of(collapsed, torch.tensor([[0, 1]]).expand(6, 2))), number(2))


def test_sequence_balance_is_a_mean_over_sequences_not_over_tokens():
    scores = torch.tensor([[0.9, 0.1]] * 3 + [[0.5, 0.5]], dtype=torch.float64)
    decision = decision_of(scores, torch.zeros(4, 1, dtype=torch.long), sequence=torch.tensor([7, 7, 7, 2]))
    assert_close(SequenceBalance()(decision), number((2 * 0.9 + 1.0) / 2))


def test_sequence_balance_skips_sequences_of_padding():
    scores = torch.tensor([[0.9, 0.1]] * 3 + [[0.5, 0.5]], dtype=torch.float64)
    notes = {"sequence": torch.tensor([0, 0, 0, 1]), "valid": torch.tensor([True, True, True, False])}
    assert_close(SequenceBalance()(decision_of(scores, torch.zeros(4, 1, dtype=torch.long), **notes)), number(1.8))


@pytest.mark.parametrize("num_experts", [1, 2, 7])
def test_z_loss_of_zero_logits_is_the_square_of_log_e(num_experts):
    decision = decision_of(torch.ones(5, num_experts, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.long))
    assert_close(z_loss(decision), number(math.log(num_experts) ** 2))


def test_z_loss_is_a_mean_over_valid_tokens():
    probs = torch.tensor([[math.e, 0.0], [1.0, 1.0], [9.0, 9.0]], dtype=torch.float64)  # exponentials of logits
    decision = decision_of(probs, torch.zeros(3, 1, dtype=torch.long), valid=torch.tensor([True, True, False]))
    assert_close(z_loss(decision), number((1 + math.log(2) ** 2) / 2))
    rows = [torch.randn(4, dtype=torch.float64) for _ in range(5)]
    decision = decision_of(torch.stack(rows).exp(), torch.zeros(5, 1, dtype=torch.long))
    assert_close(z_loss(decision), papers.z_loss(rows, [True] * 5))


def test_variation_of_a_constant_is_zero():
    assert float(cv_squared(torch.full((6,), 3.7))) == 0
    assert float(cv_squared(torch.zeros(6))) == 0
    assert float(cv_squared(torch.tensor([2.5]))) == 0  # one expert


def test_variation_uses_the_population_variance():
    """[1, 3]: mean 2, population variance 1 (the sample variance would be 2)."""
    assert_close(cv_squared(torch.tensor([1.0, 3.0], dtype=torch.float64)), number(1 / (4 + 1e-10)))


@pytest.mark.parametrize("num_experts", [2, 5])
def test_variation_at_collapse_is_experts_minus_one(num_experts):
    loads = torch.eye(num_experts, dtype=torch.float64)[0] * 9
    assert_close(cv_squared(loads), number(num_experts - 1), rtol=0, atol=1e-8)


def test_importance_sums_weights_and_load_counts_choices():
    choice, weight = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64)
    decision = Decision(SparseRouting.from_choice(choice, weight, 3), notes={"choice": choice})
    mean = 2 / 3
    variance = ((1.5 - mean) ** 2 + (0.1 - mean) ** 2 + (0.4 - mean) ** 2) / 3
    assert_close(importance_cv_squared(decision), number(variance / mean**2), rtol=1e-9, atol=0)
    assert float(load_cv_squared(decision)) == pytest.approx(2 / 9 / (4 / 3) ** 2)  # counts 2, 1, 1


@pytest.mark.parametrize(
    "loss",
    [*map(LoadTimesProbability, CONVENTIONS), SequenceBalance(), z_loss, importance_cv_squared, load_cv_squared],
)
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_without_a_valid_token_every_loss_is_zero_and_differentiable(loss, num_tokens):
    probs = torch.rand(num_tokens, 4, requires_grad=True)
    choice = torch.arange(2).expand(num_tokens, 2)
    valid = torch.zeros(num_tokens, dtype=torch.bool)
    keep = valid.unsqueeze(1).expand(num_tokens, 2)
    routing = SparseRouting.from_choice(choice, probs.gather(1, choice), 4, keep)
    value = loss(Decision(routing, probs.log(), probs, {"choice": choice, "valid": valid, "kept": keep}))
    assert float(value.detach()) == 0
    if value.requires_grad:
        (grad,) = torch.autograd.grad(value, probs)
        assert bool(grad.isfinite().all())
