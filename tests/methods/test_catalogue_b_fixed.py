"""Checks of the catalogue: routing by domain, language, table or chance (demix, m2m100, pangu-rre, thor)."""

import math

import pytest
import torch
from torch.testing import assert_close

import moestro
from moestro.balance.consistency import symmetric_divergence, two_pass_objective
from moestro.experts import FeedForward
from moestro.routers.posterior import domain_posterior, mix_predictions, updated_prior
from moestro.routing import Context


def layer(name, num_experts=4, **options):
    moe = moestro.build(name, width=5, hidden=3, num_experts=num_experts, activation="relu", **options)
    return moe.double()


def one(moe, e, x):
    """Expert e written out."""
    return (x @ moe.experts.up[e]).relu() @ moe.experts.down[e]


def tokens(count):
    return torch.randn(count, 5, dtype=torch.float64)


def test_demix_sends_every_token_to_the_expert_of_its_domain():
    moe, x, domain = layer("demix"), tokens(6), torch.tensor([3, 0, 0, 2, 1, 3])
    expected = torch.stack([one(moe, int(d), x[t]) for t, d in enumerate(domain)])
    assert_close(moe(x, Context(domain=domain)), expected)


def test_demix_with_one_domain_is_the_dense_layer():
    moe, x = layer("demix", 1), tokens(4)
    dense = FeedForward(5, 3, "relu").double()
    dense.load_state_dict({"up": moe.experts.up[0], "down": moe.experts.down[0]})
    assert_close(moe(x, Context(domain=torch.zeros(4, dtype=torch.long))), dense(x))


def test_demix_trains_only_the_expert_of_the_domain_and_removing_one_leaves_the_others():
    moe, x = layer("demix"), tokens(4)
    moe(x, Context(domain=torch.full((4,), 2))).sum().backward()
    assert [bool(moe.experts.up.grad[e].any()) for e in range(4)] == [False, False, True, False]
    before = moe(x, Context(domain=torch.tensor([0, 1, 3, 0])))
    with torch.no_grad():
        moe.experts.up[2] = math.nan
    assert_close(moe(x, Context(domain=torch.tensor([0, 1, 3, 0]))), before)


def test_demix_says_what_is_missing_and_which_domains_there_are():
    moe, x = layer("demix"), tokens(3)
    with pytest.raises(ValueError, match=r"needs Context\.domain; call the layer with Context\(domain="):
        moe(x)
    with pytest.raises(ValueError, match=r"Context\.domain holds 4 but .* built for 4; pass 0 to 3"):
        moe(x, Context(domain=torch.tensor([0, 4, 1])))
    with pytest.raises(ValueError, match="holds -1"):
        moe(x, Context(domain=torch.tensor([0, -1, 1])))
    valid = torch.tensor([True, False, True])
    assert not moe(x, Context(domain=torch.tensor([0, 99, 1]), valid=valid))[1].any(), "padding may carry any id"


@pytest.mark.parametrize("window", ["all", "one"])
def test_demix_posterior_is_bayes_rule_over_what_was_read(window):
    likelihood, prior = torch.rand(3, 5, dtype=torch.float64), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    posterior = domain_posterior(likelihood.log(), prior, window)
    for t in range(5):
        seen = range(t) if window == "all" else range(t - 1, t)
        score = [float(prior[j]) * math.prod(float(likelihood[j, s]) for s in seen) for j in range(3)]
        if t == 0:
            score = prior.tolist() if window == "all" else [1.0, 1.0, 1.0]
        assert_close(posterior[:, t], torch.tensor([s / sum(score) for s in score], dtype=torch.float64))
    assert_close(posterior.sum(0), torch.ones(5, dtype=torch.float64))


def test_demix_identical_experts_keep_the_prior_and_mix_to_one_expert():
    log_probs = torch.randn(1, 4, 7, dtype=torch.float64).log_softmax(-1).expand(3, 4, 7)
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    posterior = domain_posterior(log_probs[:, :, 0], prior)
    assert_close(posterior, prior.unsqueeze(1).expand(3, 4))
    assert_close(mix_predictions(log_probs, posterior), log_probs[0])


def test_demix_sparse_posterior_and_moving_prior():
    prior = torch.full((4,), 0.25, dtype=torch.float64)
    likelihood = torch.randn(4, 6, dtype=torch.float64)
    posterior, whole = domain_posterior(likelihood, prior, keep=2), domain_posterior(likelihood, prior)
    best = torch.zeros_like(whole).scatter(0, whole.sort(dim=0, descending=True, stable=True).indices[:2], 1.0)
    assert_close(posterior, whole * best / (whole * best).sum(0))
    assert_close(posterior.sum(0), torch.ones(6, dtype=torch.float64))
    last = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert_close(updated_prior(prior, last).tolist(), [0.175 + 0.15, 0.175 + 0.15, 0.175, 0.175])
    with pytest.raises(ValueError, match="keep=5 must be between 1 and the 4 domains"):
        domain_posterior(torch.zeros(4, 2), torch.ones(4) / 4, keep=5)


def test_m2m100_one_group_is_the_dense_layer():
    moe, x = layer("m2m100", 1, group_of_language=[0, 0, 0]), tokens(3)
    assert_close(moe(x, Context(domain=torch.tensor([0, 1, 2]))), one(moe, 0, x))


def test_m2m100_languages_of_one_group_share_the_computation():
    moe, x = layer("m2m100", 2, group_of_language=[0, 1, 0]), tokens(4)
    first, second, third = (moe(x, Context(domain=torch.full((4,), language))) for language in range(3))
    assert torch.equal(first, third)
    assert not torch.allclose(first, second)
    with pytest.raises(ValueError, match="holds 3 but"):
        moe(x, Context(domain=torch.full((4,), 3)))


def test_m2m100_rerouting_moves_a_whole_batch_in_training_only():
    moe, domain = layer("m2m100", 3, reroute=1.0), torch.tensor([0, 1, 2, 0])
    seen = set()
    for _ in range(20):
        choice = moe.route(tokens(4), Context(domain=domain)).notes["choice"].flatten()
        shift = (choice - domain) % 3
        assert len(set(shift.tolist())) == 1
        seen.add(int(shift[0]))
    assert seen == {1, 2}
    assert torch.equal(moe.eval().route(tokens(4), Context(domain=domain)).notes["choice"].flatten(), domain)
    rare = layer("m2m100", 3, reroute=0.3)
    moved = sum(int(rare.route(tokens(1), Context(domain=domain[:1])).notes["choice"]) != 0 for _ in range(300))
    assert 60 < moved < 120
    with pytest.raises(ValueError, match=r"reroute=1\.5 is a probability"):
        layer("m2m100", reroute=1.5)


def pangu(num_experts, num_domains):
    return layer("pangu-rre", num_experts, vocab_size=11, num_domains=num_domains)


def test_pangu_rre_a_domain_uses_its_group_only_and_can_be_taken_out():
    whole, x, ids = pangu(6, 3), tokens(30), torch.randint(11, (30,))
    part = pangu(2, 1)
    part.experts.load_state_dict({name: p[2:4] for name, p in whole.experts.state_dict().items()})
    part.router.tables.copy_(whole.router.tables[:, 11:22] - 2)
    y = whole(x, Context(token_ids=ids, domain=torch.ones(30, dtype=torch.long)))
    assert_close(y, part(x, Context(token_ids=ids, domain=torch.zeros(30, dtype=torch.long))))
    for domain in range(3):
        load = whole.route(x, Context(token_ids=ids, domain=torch.full((30,), domain))).routing.load()
        assert load.nonzero().flatten().tolist() == [2 * domain, 2 * domain + 1]


def test_pangu_rre_groups_of_one_are_domain_experts_and_one_domain_is_a_hash():
    ids, domain = torch.randint(11, (20,)), torch.randint(3, (20,))
    choice = pangu(3, 3).route(tokens(20), Context(token_ids=ids, domain=domain)).notes["choice"].flatten()
    assert torch.equal(choice, domain)
    single, hashed = pangu(4, 1), layer("hash-layers", vocab_size=11)
    x, none = tokens(20), torch.zeros(20, dtype=torch.long)
    first = single.route(x, Context(token_ids=ids, domain=none)).notes["choice"]
    assert torch.equal(first, hashed.route(x, Context(token_ids=ids)).notes["choice"])


def test_pangu_rre_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="num_domains=3 does not divide 4 experts"):
        pangu(4, 3)
    moe, zeros = pangu(4, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Context\.domain holds 2 but"):
        moe(tokens(3), Context(token_ids=zeros, domain=zeros + 2))
    with pytest.raises(ValueError, match=r"Context\.token_ids holds 11 but"):
        moe(tokens(3), Context(token_ids=zeros + 11, domain=zeros))
    with pytest.raises(ValueError, match=r"needs Context\.token_ids"):
        moe(tokens(3), Context(domain=zeros))


def test_thor_draws_one_expert_per_batch_in_training():
    moe, x = layer("thor"), tokens(9)
    drawn = [moe.route(x).notes["choice"].unique().tolist() for _ in range(200)]
    assert all(len(each) == 1 for each in drawn)
    counts = [sum(each == [e] for each in drawn) for e in range(4)]
    assert min(counts) > 25, "uniform"


@pytest.mark.parametrize("level", ["token", "sentence"])
def test_thor_evaluation_draws_evenly_and_repeatably(level):
    moe = layer("thor", evaluate=level).eval()
    place = torch.arange(4000)
    context = Context(token_ids=place * 7 % 31, sequence=place // 5, position=place % 50)
    choice = moe.route(tokens(4000), context).notes["choice"].flatten()
    assert torch.equal(choice, moe.route(tokens(4000), context).notes["choice"].flatten())
    assert choice.bincount(minlength=4).min() > 800
    alike = (choice.view(-1, 5) == choice.view(-1, 5)[:, :1]).all()
    assert bool(alike) == (level == "sentence")
    other = layer("thor", evaluate=level, seed=1).eval().route(tokens(4000), context).notes["choice"].flatten()
    assert not torch.equal(other, choice)


def test_thor_with_one_expert_has_two_equal_passes():
    moe, x = layer("thor", 1), tokens(4)
    assert torch.equal(moe(x), moe(x))
    assert not symmetric_divergence(moe(x), moe(x)).any()


def test_thor_objective_follows_its_equations():
    p, q = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True).unbind()
    targets, valid = torch.randint(5, (6,)), torch.arange(6) != 2
    expected = 0.0
    for t in range(6):
        if valid[t]:
            one_p, one_q = p[t].softmax(-1), q[t].softmax(-1)
            forward = sum(one_p[c] * (one_p[c] / one_q[c]).log() for c in range(5))
            backward = sum(one_q[c] * (one_q[c] / one_p[c]).log() for c in range(5))
            expected = expected - one_p[targets[t]].log() - one_q[targets[t]].log() + 0.5 * 5 * (forward + backward)
    value = two_pass_objective(p, q, targets, alpha=5.0, valid=valid)
    assert_close(value, expected)
    for a, b in zip(torch.autograd.grad(value, (p, q)), torch.autograd.grad(expected, (p, q)), strict=True):
        assert_close(a, b)
    assert_close(symmetric_divergence(p, q), symmetric_divergence(q, p))
    plain = two_pass_objective(p, p, targets, alpha=0.0)
    assert_close(plain, 2 * torch.nn.functional.cross_entropy(p, targets, reduction="sum"))
