"""Two-level noisy routing, and router gradients that reach experts which were not chosen."""

import math

import pytest
import torch
from oracles.entry import entry
from oracles.routes import best, counts_times_probability, lively, same_routing, share, tokens
from torch.testing import assert_close

import moestro


def cv_squared(values):
    n, mean = len(values), sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / n / (mean**2 + 1e-10)


def phi(z):
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def threshold(noisy, i, k):
    """The k-th largest of the others."""
    others = torch.stack([noisy[j] for j in range(len(noisy)) if j != i])
    return others[best(others, k)[-1]]


@entry("shazeer-hierarchical")
@pytest.mark.parametrize("training", [True, False])
def test_shazeer_hierarchical_routes_and_loses_by_its_equations(method, training):
    moe = lively(method, num_experts=12, num_groups=3, groups_per_token=2, experts_per_group=2).train(training)
    torch.manual_seed(5)
    noise1, noise2 = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 3, 4, dtype=torch.float64)

    def gate(x, w, v, noise):
        clean = w @ x
        std = torch.log1p(torch.exp(v @ x)) + 1e-2
        return clean, clean + noise * std if training else clean, std

    def slow(x, p):
        rows, load1 = [], [0] * 3
        load2, count = [[0] * 4 for _ in range(3)], [0] * 3
        for t in range(12):
            clean, noisy, std = gate(x[t], p["group"], p["group_noise"], noise1[t])
            groups, row = best(noisy, 2), {}
            a1 = share(torch.stack([noisy[i] for i in groups]))
            for i in range(3):
                load1[i] = load1[i] + (
                    phi((clean[i] - threshold(noisy, i, 2)) / std[i]) if training else i in groups
                )
            for n, i in enumerate(groups):
                clean2, noisy2, std2 = gate(x[t], p["expert"][i], p["expert_noise"][i], noise2[t, i])
                places = best(noisy2, 2)
                a2 = share(torch.stack([noisy2[j] for j in places]))
                row |= {4 * i + j: a1[n] * a2[m] for m, j in enumerate(places)}
                count[i] += 1
                for j in range(4):
                    chance = phi((clean2[j] - threshold(noisy2, j, 2)) / std2[j]) if training else j in places
                    load2[i][j] = load2[i][j] + chance
            rows.append(row)
        zero = torch.zeros((), dtype=torch.float64)
        load = [load2[i][j] * load1[i] / (count[i] + 1e-10) + zero for i in range(3) for j in range(4)]
        importance = [sum((row.get(e, zero) for row in rows), zero) for e in range(12)]
        return rows, {"importance": cv_squared(importance), "load": cv_squared(load)}

    torch.manual_seed(5)
    decision = same_routing(moe, slow)
    assert_close(decision.routing.combine_matrix().sum(1), torch.ones(12, dtype=torch.float64))


@entry("shazeer-hierarchical")
def test_shazeer_hierarchical_with_one_group_is_the_flat_method(method):
    moe = lively(method, num_groups=1, groups_per_token=1, experts_per_group=3).eval()
    flat = lively("shazeer-noisy-topk", top_k=3).eval()
    flat.router.scorer.weight.data.copy_(moe.router.expert[0])
    x = tokens()
    assert_close(moe.route(x).routing.combine_matrix(), flat.route(x).routing.combine_matrix())


@entry("shazeer-hierarchical")
def test_shazeer_hierarchical_with_all_experts_is_the_dense_tree(method):
    moe, x = lively(method, num_groups=2, groups_per_token=2, experts_per_group=4).eval(), tokens()
    outer = (x @ moe.router.group.T).softmax(-1)
    inner = torch.stack([(x @ moe.router.expert[i].T).softmax(-1) for i in range(2)], 1)
    assert_close(moe.route(x).routing.combine_matrix(), (outer[:, :, None] * inner).flatten(1))


@entry("dense-mixer")
def test_dense_mixer_answers_as_top_k_and_teaches_the_router_from_all(method):
    moe, plain = lively(method, top_k=2).train(), lively("olmoe", top_k=2)
    plain.load_state_dict({name.replace("router.router", "router"): v for name, v in moe.state_dict().items()})
    x, probe = tokens(), tokens(seed=7)
    assert_close(moe(x), plain(x))
    assert_close(moe.eval()(x), plain(x))
    moe.train()

    def gradients(layer):
        return torch.autograd.grad((layer(x) * probe).sum(), list(layer.parameters()))

    ours, theirs = gradients(moe), gradients(plain)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert_close(a, b)  # experts learn from their own tokens only
    weight = moe.router.router.scorer.weight.detach().requires_grad_()
    total = 0.0
    for t in range(12):
        p = share(weight @ x[t])
        for e in range(8):
            answer = moe.experts(x[t : t + 1], torch.tensor([0] * (e + 1) + [1] * (8 - e)))[0].detach()
            total = total + p[e] * (answer @ probe[t])
    assert_close(ours[0], torch.autograd.grad(total, weight)[0])
    assert not torch.allclose(ours[0], theirs[0])


@entry("sparse-mixer")
@pytest.mark.parametrize("training", [True, False])
def test_sparse_mixer_agrees_with_transformers(method, training):
    modeling = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    moe = lively(method, epsilon=0.4).train(training)
    x, probe = tokens(50), tokens(50, 2, seed=4)
    torch.manual_seed(2)
    decision = moe.route(x)
    choice = decision.notes["choice"]
    weight = decision.routing.combine_matrix().gather(1, choice)
    torch.manual_seed(2)
    scores = (x @ moe.router.scorer.weight.T).detach().requires_grad_()
    theirs, index = modeling.sparsemixer(scores, 0.4, training)
    assert torch.equal(choice, index)
    assert_close(weight[:, 0], theirs[:, 0], rtol=2e-4, atol=1e-6)  # theirs writes 1/3 as 0.3333
    ratio = (weight[:, 1] / theirs[:, 1]).detach()  # theirs draws B twice here: 1 or 1/3 on either side
    assert bool(((ratio.log().abs() < 1e-3) | ((ratio.log().abs() - math.log(3)).abs() < 1e-3)).all())
    (ours,) = torch.autograd.grad((weight * probe).sum(), moe.router.scorer.weight)
    (back,) = torch.autograd.grad((theirs * probe).sum(), scores)
    assert_close(ours, back.T @ x)


@entry("sparse-mixer")
def test_sparse_mixer_evaluates_the_best_and_loses_by_its_equation(method):
    def slow(x, p):
        rows, chosen, probs = [], [], []
        for t in range(len(x)):
            z, row, left = p["scorer.weight"] @ x[t], {}, list(range(8))
            for _ in range(2):
                top = max(left, key=lambda i: float(z[i].detach()))
                near = [
                    i for i in left if float(((z[top] - z[i]) / torch.maximum(z[i].abs(), z[top])).detach()) <= 0.8
                ]
                row[top] = torch.exp(z[top]) / sum(torch.exp(z[i]) for i in near)
                left.remove(top)
            rows.append(row)
            chosen.append(list(row))
            probs.append(share(z))
        return rows, {"balance": counts_times_probability(probs, chosen, 2 * len(x))}

    same_routing(lively(method, epsilon=0.4).eval(), slow)
    with pytest.raises(ValueError, match=r"epsilon=0\.0 must be above 0"):
        moestro.build(method, width=6, hidden=3, num_experts=4, epsilon=0.0)
