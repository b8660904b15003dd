import math

import pytest
import torch
from torch.testing import assert_close

from moestro.inspect import LayerTally, layer_statistics, routing_record
from moestro.inspect.dead import dead_experts, dead_threshold
from moestro.routing import Decision, MergeRouting, SoftRouting, SparseRouting


def decide(probs, k=1, keep=None, valid=None):
    """A token-choice decision straight from probabilities `[tokens, experts]`."""
    weight, choice = torch.as_tensor(probs).topk(k)
    routed = torch.ones_like(choice, dtype=torch.bool) if keep is None else torch.as_tensor(keep)
    notes = {"choice": choice, "kept": routed}
    if valid is not None:
        notes["valid"] = torch.as_tensor(valid)
        routed = routed & notes["valid"][:, None]
        notes["kept"] = routed
    routing = SparseRouting.from_choice(choice, weight, torch.as_tensor(probs).shape[1], routed)
    return Decision(routing, probs=torch.as_tensor(probs), notes=notes)


PROBS = [[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.4, 0.5]]


def test_load_counts_choices_and_sums_to_one():
    statistics = layer_statistics(decide(PROBS))
    assert statistics["load"] == [0.5, 0.25, 0.25]
    assert (statistics["tokens"], statistics["experts_per_token"], statistics["dropped"]) == (4, 1.0, 0.0)


def test_load_counts_choices_before_capacity_and_drops_after_it():
    statistics = layer_statistics(decide(PROBS, keep=[[True], [True], [False], [True]]))
    assert statistics["load"] == [0.5, 0.25, 0.25]
    assert statistics["dropped"] == 0.25


def test_margin_is_the_gap_between_the_last_chosen_and_the_first_not_chosen():
    assert layer_statistics(decide(PROBS, k=1))["margin"] == pytest.approx((0.2 + 0.5 + 0.3 + 0.1) / 4)
    assert layer_statistics(decide(PROBS, k=2))["margin"] == pytest.approx((0.1 + 0.1 + 0.2 + 0.3) / 4)
    assert layer_statistics(decide(PROBS, k=3))["margin"] is None  # every expert is chosen


def test_entropy_of_even_and_of_certain_probabilities():
    assert layer_statistics(decide(torch.full((5, 8), 1 / 8)))["entropy"] == pytest.approx(math.log(8), rel=1e-5)
    assert layer_statistics(decide(torch.eye(3)))["entropy"] == 0.0


def test_scores_that_do_not_sum_to_one_are_normalised_first():
    plain, sigmoids = decide(PROBS), decide(3 * torch.tensor(PROBS))
    for name in ("entropy", "margin"):
        assert layer_statistics(plain)[name] == pytest.approx(layer_statistics(sigmoids)[name])


def test_padding_changes_nothing():
    padded = decide([*PROBS, [0.0, 0.0, 1.0], [0.9, 0.1, 0.0]], k=2, valid=[True] * 4 + [False] * 2)
    assert layer_statistics(padded) == layer_statistics(decide(PROBS, k=2))


def test_many_decisions_equal_one_long_one():
    probs = torch.rand(50, 6).softmax(-1)
    keep = torch.rand(50, 2) < 0.8
    pieces = [decide(probs[a:b], 2, keep[a:b]) for a, b in ((0, 3), (3, 40), (40, 50))]
    together, apart = layer_statistics(decide(probs, 2, keep)), layer_statistics(pieces)
    assert apart.keys() == together.keys()
    for name, value in together.items():
        assert apart[name] == pytest.approx(value, rel=2e-6), name


def test_expert_choice_drops_the_tokens_that_no_expert_took():
    routing = SparseRouting.from_experts(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), num_tokens=5)
    statistics = layer_statistics(Decision(routing, notes={"valid": torch.tensor([True] * 4 + [False])}))
    assert statistics["load"] == [0.5, 0.5]
    assert (statistics["dropped"], statistics["experts_per_token"]) == (0.25, 1.0)
    assert statistics["entropy"] is None
    assert statistics["margin"] is None


def test_soft_routing_shares_out_the_combine_weight_of_valid_tokens():
    combine = torch.tensor([[0.75, 0.25], [0.25, 0.75], [1.0, 0.0]]).view(1, 3, 2, 1)
    routing = SoftRouting(torch.arange(3)[None], torch.full((1, 2, 1, 3), 1 / 3), combine, 3)
    assert layer_statistics(Decision(routing))["load"] == pytest.approx([2 / 3, 1 / 3], rel=1e-5)
    padded = Decision(routing, notes={"valid": torch.tensor([True, True, False])})
    assert layer_statistics(padded)["load"] == [0.5, 0.5]
    assert layer_statistics(padded)["dropped"] == 0.0


def test_merging_shares_out_the_mixture():
    rows = SparseRouting.from_choice(torch.tensor([[0], [0], [0], [1]]), torch.ones(4, 1), num_experts=2)
    routing = MergeRouting(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), rows)
    statistics = layer_statistics(Decision(routing))
    assert statistics["load"] == [0.375, 0.375, 0.25]
    assert statistics["experts_per_token"] == 1.0


def test_dead_is_below_one_percent_of_the_tokens():
    assert dead_threshold(16, 2) == 0.01
    assert dead_threshold(256, 1) == pytest.approx(1 / 1024)  # 1 % would condemn an even load
    assert dead_experts([0.9, 0.0951, 0.0049], experts_per_token=2) == [2]  # 0.98 % of the tokens
    assert dead_experts([0.9, 0.095, 0.005], experts_per_token=2) == []
    assert layer_statistics(decide(torch.eye(4)[[0, 0, 1, 2]]))["dead"] == 1


def test_no_token_at_all_is_no_number_rather_than_a_crash():
    statistics = layer_statistics(decide(torch.rand(0, 4)))
    assert statistics["load"] == [0.0] * 4
    assert statistics["entropy"] is None
    assert statistics["dropped"] is None


def test_nothing_recorded_is_refused():
    with pytest.raises(ValueError, match="record at least one batch"):
        layer_statistics([])


def test_record_names_every_layer_in_order():
    record = routing_record(7, {"layers.0.moe": [decide(PROBS)], "layers.1.moe": [decide(PROBS), decide(PROBS)]})
    assert record["step"] == 7
    assert [layer["name"] for layer in record["layers"]] == ["layers.0.moe", "layers.1.moe"]
    assert [layer["tokens"] for layer in record["layers"]] == [4, 8]


def test_tally_keeps_no_graph():
    probs = torch.rand(4, 3, requires_grad=True)
    tally = LayerTally()
    tally.add(decide(probs))
    assert tally.load is not None
    assert not tally.load.requires_grad
    assert_close(tally.load.sum(), torch.tensor(4.0, dtype=torch.float64))


def test_choices_that_the_rule_did_not_make_are_neither_load_nor_dropped():
    made = torch.tensor([[True, True], [True, False], [True, False], [True, True]])
    decision = decide(PROBS, k=2, keep=[[True, False], [True, False], [True, False], [True, True]])
    decision = Decision(decision.routing, probs=decision.probs, notes={**decision.notes, "wanted": made})
    statistics = layer_statistics(decision)
    assert statistics["load"] == pytest.approx([2 / 6, 3 / 6, 1 / 6], rel=1e-5)  # choices 0 1, 1, 0, 2 1
    assert statistics["dropped"] == pytest.approx(1 / 6, rel=1e-5)
    assert statistics["experts_per_token"] == pytest.approx(6 / 4)
