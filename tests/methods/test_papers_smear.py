"""SMEAR against its equations: Muqeeth et al. 2023."""

import pytest
import torch
from oracles import papers
from oracles.harness import build, check_layer, random_case
from torch import nn
from torch.testing import assert_close

import moestro
from moestro.experts import ModuleExperts
from moestro.methods import find_method
from moestro.routing import Context, MergeRouting, SparseRouting


def smear(**options):
    sizes = {"width": 5, "hidden": 4, "num_experts": 3} | options
    return moestro.build("smear", **sizes).double()


@pytest.mark.parametrize("seed", range(42))
def test_smear_follows_its_equations(seed):
    case = random_case(seed)
    layer = build("smear", case, expert_dropout=0.0 if seed % 2 else 0.4)  # dropout is off in evaluation
    embedding = layer.router.embedding

    def slow(twin, x, _):
        return papers.smear(
            x, twin(embedding), twin.bank, case.activation, valid=case.valid_list, sequence=case.sequence.tolist()
        )

    check_layer(layer, case, slow)


@pytest.mark.parametrize("seed", range(30))
def test_smear_drops_experts_in_training(seed):
    case = random_case(seed)
    layer = build("smear", case, expert_dropout=0.4).train()
    embedding, names = layer.router.embedding, case.sequence.unique().tolist()
    torch.manual_seed(seed)
    draws = torch.rand(len(names), case.num_experts, dtype=torch.float64)
    dropped = {name: (draw < 0.4).tolist() for name, draw in zip(names, draws, strict=True)}
    torch.manual_seed(seed)

    def slow(twin, x, _):
        return papers.smear(
            x, twin(embedding), twin.bank, case.activation, valid=case.valid_list,
            sequence=case.sequence.tolist(), dropped=dropped,
        )  # fmt: skip

    check_layer(layer, case, slow)


def test_smear_drops_as_often_as_it_says():
    layer = smear(num_experts=4, expert_dropout=0.25).train()
    decision = layer.route(torch.randn(4000, 5, dtype=torch.float64), Context(sequence=torch.arange(4000)))
    gone = decision.routing.mixture < 1e-4
    assert float(gone.double().mean()) == pytest.approx(0.25, abs=0.02)
    assert_close(decision.routing.mixture.sum(1), torch.ones(4000, dtype=torch.float64))


def test_smear_with_all_weight_on_one_expert_is_that_expert():
    layer, x = smear(), torch.randn(6, 5, dtype=torch.float64)
    rows = SparseRouting.from_choice(torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1).double(), 1)
    for expert, offsets in enumerate(([0, 6, 6, 6], [0, 0, 6, 6], [0, 0, 0, 6])):
        mixture = torch.eye(3, dtype=torch.float64)[expert : expert + 1]
        merged = layer.experts.run(x, MergeRouting(mixture, rows))
        assert_close(merged, layer.experts(x, torch.tensor(offsets)), rtol=0, atol=1e-14)


def test_smear_of_linear_experts_mixes_their_outputs():
    maps = [nn.Linear(5, 5).double() for _ in range(4)]
    layer, x = find_method("smear").build(ModuleExperts(maps, 5)).eval(), torch.randn(6, 5, dtype=torch.float64)
    layer.router.embedding.data = torch.randn(4, 5, dtype=torch.float64)
    p = layer.route(x).probs
    assert_close(layer(x), sum(p[:, e : e + 1] * maps[e](x) for e in range(4)))


def test_smear_of_equal_experts_is_that_expert():
    layer, x = smear().eval(), torch.randn(6, 5, dtype=torch.float64)
    for parameter in layer.experts.parameters():
        parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    layer.router.embedding.data.normal_()
    assert_close(layer(x), layer.experts(x, torch.tensor([0, 6, 6, 6])))


def test_smear_mixes_no_sequences():
    layer, x = smear().eval(), torch.randn(3, 4, 5, dtype=torch.float64)
    layer.router.embedding.data.normal_()
    assert_close(layer(x), torch.stack([layer(one) for one in x]))


def test_smear_gradient_reaches_every_expert_and_the_router():
    layer, x = smear().eval(), torch.randn(6, 5, dtype=torch.float64)
    layer(x).square().sum().backward()
    for parameter in layer.parameters():
        assert bool((parameter.grad.flatten(1).abs().sum(1) > 0).all())
