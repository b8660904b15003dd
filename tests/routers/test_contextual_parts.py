"""Parts see the context, and choices that a rule did not make count for nobody."""

import torch
from torch import Tensor
from torch.testing import assert_close

import moestro
from moestro.balance import load_times_probability
from moestro.balance.counts import chosen_load
from moestro.routers import Linear, Scorer, TokenChoice, TopK, as_is, softmax
from moestro.routing import Context, Decision, Selection, SparseRouting
from moestro.routing.context import NO_CONTEXT


class ByDomain(Scorer):
    num_experts = 3

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        return torch.eye(3, dtype=x.dtype)[context.need("domain", "this scorer")]


class FirstOnly(TopK):
    def forward(self, scores: Tensor, context: Context = NO_CONTEXT) -> Selection:
        chosen = super().forward(scores, context)
        return chosen.restricted(torch.tensor([True, False]).expand_as(chosen.index))


def test_a_scorer_sees_the_context() -> None:
    router = TokenChoice(ByDomain(), TopK(1), softmax, as_is)
    decision = router(torch.randn(4, 2), Context(domain=torch.tensor([2, 0, 0, 1])))
    assert decision.notes["choice"].flatten().tolist() == [2, 0, 0, 1]


def test_a_choice_that_was_not_made_is_noted_and_not_counted() -> None:
    router = TokenChoice(Linear(2, 3), FirstOnly(2), softmax, as_is)
    decision = router(torch.randn(5, 2), Context(valid=torch.tensor([True, True, True, False, True])))
    assert decision.notes["wanted"].tolist() == [[True, False]] * 5
    assert decision.notes["kept"][:, 0].tolist() == [True, True, True, False, True]
    assert int(chosen_load(decision).sum()) == 4


def test_balance_divides_by_the_choices_made() -> None:
    """Uniform probabilities make E sum f P = sum f: 1 for megatron, choices per token for transformers."""
    choice, wanted = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[True, False], [True, True]])
    routing = SparseRouting.from_choice(choice, torch.ones(2, 2), 3, wanted)
    decision = Decision(routing, None, torch.full((2, 3), 1 / 3), {"choice": choice, "wanted": wanted})
    assert_close(load_times_probability(decision, "megatron"), torch.tensor(1.0))
    assert_close(load_times_probability(decision, "transformers"), torch.tensor(1.5))
    assert_close(load_times_probability(decision, "switch"), torch.tensor(1.0))


def test_expert_choice_learns_to_guess_who_picks_and_then_decides_by_it():
    torch.manual_seed(0)
    moe = moestro.build("expert-choice", width=6, hidden=4, num_experts=4, capacity_factor=1.0, predict=1.0)
    torch.nn.init.normal_(moe.router.router.scorer.weight)
    x, log = torch.randn(64, 6), moestro.RoutingLog(moe)
    optimiser = torch.optim.Adam(moe.router.parameters(), lr=0.02)
    first = None
    for _ in range(150):
        with log.recording():
            moe(x)
        loss = log.auxiliary_loss()
        first = float(loss.detach()) if first is None else first
        optimiser.zero_grad()
        loss.backward()
        assert moe.router.router.scorer.weight.grad is None, "the guess teaches the predictor alone"
        optimiser.step()
    decision = moe.route(x)
    picked = decision.routing.combine_matrix() > 0
    assert torch.equal(decision.notes["picked"], picked)
    assert picked.sum(0).tolist() == [16] * 4
    assert float(log.losses()["prediction"]) < 0.5 * first
    evaluated = moe.eval().route(x)
    matrix = evaluated.routing.combine_matrix().detach()
    scores = (x @ moe.router.router.scorer.weight.T).softmax(1).detach()
    assert_close(matrix, scores * (evaluated.notes["guess"] > 0))
    assert float(((matrix > 0) == picked).float().mean()) > 0.85
    alone = moe.route(x[:1]).routing.combine_matrix().detach()
    assert_close(alone, matrix[:1])
