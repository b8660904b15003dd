"""Each part of a router against its equation on paper."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

import moestro
from moestro.methods.registry import all_methods
from moestro.routers import (
    BiasedSelection,
    DropByPosition,
    ExpertChoice,
    GaussianNoise,
    GroupLimitedTopK,
    InputJitter,
    Linear,
    RandomSecond,
    Renormalised,
    TokenChoice,
    TopK,
    as_is,
    gshard_slots,
    softmax,
    softmax_over_selected,
    switch_slots,
)
from moestro.routers.capacities import place_in_line
from moestro.routers.fixed import HashRouter, by_bigram, by_position, by_previous, by_token
from moestro.routers.tables import balanced_table, dispersed_table, random_table
from moestro.routing import Context, Selection


def test_linear_scorer_is_a_product_in_the_precision_of_x() -> None:
    scorer = Linear(5, 3).bfloat16()
    x = torch.randn(4, 5, dtype=torch.float64)
    assert_close(scorer(x), x @ scorer.weight.double().t())
    assert not Linear(5, 3, std=0).weight.any()


def test_jitter_reaches_the_scorer_only_and_only_in_training() -> None:
    scorer = Linear(4, 2)
    jittered, x = InputJitter(scorer, 0.1), torch.ones(1000, 4)
    assert not torch.equal(jittered(x), scorer(x))
    assert torch.equal(x, torch.ones(1000, 4)), "the caller's tensor is untouched"
    assert torch.equal(jittered.eval()(x), scorer(x))
    with pytest.raises(ValueError, match="jitter=1"):
        InputJitter(scorer, 1.0)


def test_jitter_is_uniform_around_one() -> None:
    scorer = Linear(1, 1)
    torch.nn.init.ones_(scorer.weight)
    factor = InputJitter(scorer, 0.25)(torch.ones(20000, 1)).detach()
    assert 0.75 <= float(factor.min()) < 0.76
    assert 1.24 < float(factor.max()) <= 1.25
    assert abs(float(factor.mean()) - 1) < 0.005


def test_gaussian_noise_has_the_learned_size() -> None:
    noise = GaussianNoise(2, 3, floor=0.5)
    x, logits = torch.ones(20000, 2), torch.zeros(20000, 3)
    with torch.no_grad():
        noise.weight[1] = 1.0
    noisy, notes = noise(x, logits)
    std = torch.tensor([0.6931, 2.1269, 0.6931]) + 0.5  # softplus(0), softplus(2)
    assert_close(notes["noise_std"][0], std, rtol=0, atol=1e-3)
    assert_close(noisy.std(0), std, rtol=0.03, atol=0)
    assert noise.eval()(x, logits) == (logits, {})


def test_group_limit_keeps_the_best_groups() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.5, 0.4]])  # groups of two: sums 0.9, 0.5, 0.9
    assert GroupLimitedTopK(2, 3, 1)(scores).index.tolist() == [[0, 1]], "ties go to the first group"
    assert GroupLimitedTopK(2, 3, 2)(scores).index.tolist() == [[0, 4]]
    assert GroupLimitedTopK(2, 3, 1, best_of=1)(scores).index.tolist() == [[0, 1]]
    assert GroupLimitedTopK(3, 3, 3)(scores).index.tolist() == TopK(3)(scores).index.tolist()
    negative = torch.tensor([[-5.0, -6.0, -1.0, -2.0]])
    assert GroupLimitedTopK(2, 2, 1)(negative).index.tolist() == [[2, 3]], "left-out groups are -inf, not 0"


def test_group_limits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="groups_kept=4 must be between 1 and num_groups=2"):
        GroupLimitedTopK(2, 2, 4)
    with pytest.raises(ValueError, match="num_groups=4 does not divide 6 experts"):
        GroupLimitedTopK(2, 4, 2).check(6)
    with pytest.raises(ValueError, match="top_k=3 but 1 of 4 groups hold 2 experts"):
        GroupLimitedTopK(3, 4, 1).check(8)
    with pytest.raises(ValueError, match="top_k=5 but there are 4 experts; pass 1 <= top_k <= 4"):
        TopK(5)(torch.rand(3, 4))


def test_the_bias_chooses_but_never_weighs_and_stays_float32() -> None:
    router = TokenChoice(Linear(4, 3), BiasedSelection(TopK(1), 3), softmax, as_is)
    x = torch.randn(6, 4)
    router.select.bias[2] = 10.0
    decision = router(x)
    assert decision.notes["choice"].unique().tolist() == [2]
    assert_close(decision.routing.weight, decision.probs[:, 2])
    for cast in (router.bfloat16, router.half, router.double):
        assert cast().select.bias.dtype == torch.float32
    assert router.select.bias.tolist() == [0, 0, 10.0]


def test_random_second_keeps_it_by_its_weight() -> None:
    select = RandomSecond(TopK(2))
    scores = torch.tensor([[0.6, 0.3, 0.1]]).expand(20000, 3)  # g2 = 1/3, kept with probability 2/3
    kept = select(scores).keep
    assert kept is not None
    assert kept[:, 0].all()
    assert abs(float(kept[:, 1].float().mean()) - 2 / 3) < 0.02
    assert select(torch.tensor([[0.5, 0.5]]).expand(500, 2)).keep[:, 1].all()
    assert select.eval()(scores).keep is None
    with pytest.raises(ValueError, match="two choices"):
        RandomSecond(TopK(3))


def test_weighing_rules() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    probs, chosen = logits.softmax(-1), Selection(torch.tensor([[1, 0]]))
    assert_close(as_is(logits, probs, chosen), probs[:, [1, 0]])
    both = softmax_over_selected(logits, probs, chosen)
    assert_close(both, torch.tensor([[0.7311, 0.2689]]), rtol=0, atol=1e-4)
    assert_close(Renormalised()(logits, probs, chosen), both)
    assert_close(Renormalised(scale=2.5)(logits, probs, chosen).sum(), torch.tensor(2.5))


def test_first_choices_go_before_second_ones() -> None:
    chosen = Selection(torch.tensor([[0, 1], [1, 0], [0, 1]]))
    assert place_in_line(chosen, 2).tolist() == [[0, 1], [0, 2], [1, 2]]
    skipping = chosen.restricted(torch.tensor([[False, True], [True, True], [True, True]]))
    places = place_in_line(skipping, 2)
    assert [places[0, 1], places[1, 0], places[1, 1], places[2, 0], places[2, 1]] == [1, 0, 1, 0, 2]


def test_dropping_by_position_uses_the_phase_it_is_in() -> None:
    drop = DropByPosition(lambda tokens, experts: 1, lambda tokens, experts: 2)
    chosen = Selection(torch.zeros(4, 1, dtype=torch.long))
    assert drop(chosen, torch.ones(4, 1), 2, Context()).keep.flatten().tolist() == [True, False, False, False]
    assert drop.eval()(chosen, torch.ones(4, 1), 2, Context()).keep.flatten().tolist() == [True, True, False, False]
    assert drop.causal(1)
    assert not drop.causal(2)


@pytest.mark.parametrize(
    ("slots", "tokens", "expected"),
    [
        (partial(switch_slots, factor=1.25), 64, 20),
        (partial(switch_slots, factor=1.25), 5, 4),  # the released code's minimum
        (partial(switch_slots, factor=9.0), 64, 64),  # never more than there are tokens
        (partial(gshard_slots, factor=2.0), 9, 6),
    ],
)
def test_capacity_formulas(slots: partial, tokens: int, expected: int) -> None:
    assert slots(tokens, 4) == expected


LIMITED = [
    pytest.param(name, option, id=f"{name}-{option}")
    for name, method in all_methods().items()
    for option in method.options
    if option.endswith("capacity_factor") and (name, option) != ("tutel-top-any", "capacity_factor")  # 0: dropless
]


@pytest.mark.parametrize(("name", "option"), LIMITED)
@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_capacity_that_keeps_nothing_is_refused_at_build(name: str, option: str, factor: float) -> None:
    options = all_methods()[name].options
    needed = {each: 2 for each in ("num_domains", "num_groups", "vocab_size") if each in options}
    with pytest.raises(ValueError, match=r"capacity.factor.*above 0|keeps nothing"):
        moestro.build(name, width=8, hidden=4, num_experts=4, **needed, **{option: factor})


def test_a_capacity_that_keeps_nothing_of_these_tokens_says_what_to_do() -> None:
    moe = moestro.build("gshard-top2", width=8, hidden=4, num_experts=4, capacity_factor=0.5)
    moe(torch.randn(8, 8))
    moe(torch.randn(0, 8))
    with pytest.raises(
        ValueError, match=r"0 slots per expert for 3 tokens and 4 experts.*raise the capacity factor"
    ):
        moe(torch.randn(3, 8))


def test_expert_choice_fills_every_expert_evenly() -> None:
    router = ExpertChoice(Linear(4, 3), 1.5)
    decision = router(torch.randn(10, 4))
    assert decision.routing.load().tolist() == [5, 5, 5]
    assert [router.slots(n, 3) for n in (0, 1, 2, 10)] == [0, 1, 1, 5]
    with pytest.raises(ValueError, match=r"capacity_factor=4\.0 must be above 0 and at most the 3 experts"):
        ExpertChoice(Linear(4, 3), 4.0)


def test_tables() -> None:
    assert torch.equal(random_table(50, 4), random_table(50, 4))
    assert random_table(1000, 4).bincount(minlength=4).min() > 200
    frequencies = [50, 1, 30, 20, 1, 8]
    load = torch.zeros(3).scatter_add(0, balanced_table(frequencies, 3), torch.tensor(frequencies).float())
    assert load.max() - load.min() <= 50
    assert load.tolist() == [50, 30, 30]
    spread = dispersed_table([0] * 6 + [1] * 3, 3)
    assert spread[:6].bincount().tolist() == [2, 2, 2]
    assert spread[6:].bincount().tolist() == [1, 1, 1]


def test_hash_keys() -> None:
    facts = Context(token_ids=torch.tensor([4, 5, 6, 4, 5]), sequence=torch.tensor([0, 0, 0, 1, 1]))
    assert by_token(facts, 8).tolist() == [4, 5, 6, 4, 5]
    assert by_previous(facts, 8).tolist() == [7, 4, 5, 7, 4]
    pairs = by_bigram(facts, 1 << 20).tolist()
    assert pairs[0] == pairs[3], "the same pair (start, 4)"
    assert pairs[1] == pairs[4], "the same pair (4, 5)"
    assert len(set(pairs)) == 3
    with pytest.raises(ValueError, match=r"needs Context\.position"):
        by_position(facts, 8)


def test_hash_router_refuses_what_its_table_does_not_hold() -> None:
    router = HashRouter(torch.tensor([[0, 1, 1]]), 2, by_token)
    with pytest.raises(ValueError, match="token id 9 is outside the hash table of 3 entries"):
        router(torch.zeros(2, 4), Context(token_ids=torch.tensor([1, 9])))
    with pytest.raises(ValueError, match="experts 0 to 1, got 5"):
        HashRouter(torch.tensor([[0, 5]]), 2, by_token)
    padded = Context(token_ids=torch.tensor([1, -100]), valid=torch.tensor([True, False]))
    assert router(torch.zeros(2, 4), padded).routing.load().tolist() == [0, 1]


def test_routers_decide_in_float32_under_autocast() -> None:
    router = TokenChoice(Linear(4, 3), TopK(2), softmax, as_is)
    with torch.autocast("cpu", torch.bfloat16):
        decision = router(torch.randn(5, 4, dtype=torch.bfloat16))
    assert decision.logits.dtype == decision.probs.dtype == decision.routing.weight.dtype == torch.float32
