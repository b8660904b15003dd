"""DeepSeek-V3's routing against its equations: DeepSeek-AI 2024; loss-free balancing: Wang et al. 2024."""

import pytest
import torch
from oracles import papers
from oracles.harness import build, check_layer, random_case
from torch.testing import assert_close

import moestro
from moestro import RoutingLog
from moestro.routing import Context


def deepseek(**options):
    sizes = {"width": 5, "hidden": 4, "num_experts": 8, "top_k": 3} | options
    layer = moestro.build("deepseek-v3", **sizes).double()
    layer.router.scorer.weight.data.normal_()
    return layer


@pytest.mark.parametrize("seed", range(56))
def test_deepseek_v3_follows_its_equations(seed):
    num_groups, groups_kept, top_k = [(1, 1, 1), (2, 1, 2), (3, 2, 2), (2, 2, 3), (1, 1, 2), (3, 1, 1)][seed % 6]
    case = random_case(seed, least_experts=2, multiple=num_groups)
    top_k = min(top_k, case.num_experts // num_groups * groups_kept)
    options = {"route_scale": [2.5, 1.0][seed % 2], "shared_experts": seed % 3}
    layer = build("deepseek-v3", case, top_k=top_k, num_groups=num_groups, groups_kept=groups_kept, **options)
    layer.router.select.bias.normal_()  # often below -1, so that biased scores are negative
    if seed % 5 == 4:
        layer.router.select.bias.round_()  # the scores of these cases tie
    bias, router = layer.router.select.bias.tolist(), layer.router.scorer.weight

    def slow(twin, x, _):
        return papers.deepseek_v3(
            x, twin(router), bias, twin.experts, top_k, num_groups, groups_kept, options["route_scale"],
            twin.shared, case.valid_list, case.sequence.tolist(),
        )  # fmt: skip

    check_layer(layer, case, slow)


def test_deepseek_v3_chooses_as_transformers_does():
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = modeling.DeepseekV3Config(
        hidden_size=5, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, routed_scaling_factor=2.5
    )
    theirs, ours = modeling.DeepseekV3TopkRouter(config), deepseek(num_groups=4, groups_kept=2).float()
    ours.router.select.bias.normal_()
    with torch.no_grad():
        theirs.weight.copy_(ours.router.scorer.weight)
        theirs.e_score_correction_bias.copy_(ours.router.select.bias)
    x = torch.randn(40, 5)
    _, weight, index = theirs(x)
    assert_close(ours.route(x).routing.combine_matrix(), torch.zeros(40, 8).scatter(1, index, weight))


def test_deepseek_v3_bias_changes_no_output_while_the_choice_is_the_same():
    layer, x = deepseek(), torch.randn(20, 5, dtype=torch.float64)
    before, choice = layer(x), layer.route(x).notes["choice"]
    layer.router.select.bias.copy_(torch.rand(8) * 1e-6)
    assert layer.route(x).notes["choice"].tolist() == choice.tolist()
    assert_close(layer(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("constant", [-3.0, 0.5, 2.0])
def test_deepseek_v3_a_constant_on_every_bias_changes_no_choice(constant):
    layer, x = deepseek(num_groups=4, groups_kept=2), torch.randn(50, 5, dtype=torch.float64)
    before = layer.route(x).notes["choice"]
    layer.router.select.bias += constant
    assert layer.route(x).notes["choice"].tolist() == before.tolist()


def test_deepseek_v3_weights_sum_to_the_route_scale():
    layer = deepseek(route_scale=1.7)
    layer.router.select.bias.normal_()
    combine = layer.route(torch.randn(20, 5, dtype=torch.float64)).routing.combine_matrix()
    assert_close(combine.sum(1), torch.full((20,), 1.7, dtype=torch.float64))
    assert combine.gt(0).sum(1).tolist() == [3] * 20


def test_deepseek_v3_groups_left_out_stay_out_when_biased_scores_are_negative():
    layer = deepseek(num_groups=4, groups_kept=1, top_k=2)
    layer.router.select.bias.fill_(-5.0)
    choice = layer.route(torch.randn(50, 5, dtype=torch.float64)).notes["choice"]
    assert (choice[:, 0] // 2).tolist() == (choice[:, 1] // 2).tolist()


@pytest.mark.parametrize("seed", range(10))
def test_deepseek_v3_bias_steps_by_the_sign_of_the_missing_load(seed):
    case = random_case(seed + 1, least_experts=3)
    layer = build("deepseek-v3", case, top_k=2, bias_rate=0.01, shared_experts=0).train()
    log, load = RoutingLog(layer), [0] * case.num_experts
    start = torch.randn(case.num_experts)
    layer.router.select.bias.copy_(start)
    for _ in range(2):  # two micro-batches, one step
        x = torch.randn(case.num_tokens, case.width, dtype=torch.float64)
        with log.recording():
            layer(x, case.context)
        answer = papers.deepseek_v3(
            x, layer.router.scorer.weight, start.tolist(), [lambda row: row] * case.num_experts, 2,
            valid=case.valid_list,
        )  # fmt: skip
        for choice, kept in zip(answer.choice, answer.kept, strict=True):
            for expert, stays in zip(choice, kept, strict=True):
                load[expert] += stays
    assert layer.router.select.bias.tolist() == start.tolist()  # nothing moves before the step
    log.update_controllers()
    expected = papers.bias_step(start.tolist(), load, 0.01)
    assert_close(layer.router.select.bias, torch.tensor(expected), rtol=0, atol=1e-7)  # the buffer is float32


def test_deepseek_v3_load_becomes_even_under_repeated_updates():
    layer, x = deepseek(bias_rate=0.002, top_k=2).train(), torch.randn(400, 5, dtype=torch.float64)
    layer.router.scorer.weight.data[0] = layer.router.scorer.weight.data[1:].mean(0)
    log, worst = RoutingLog(layer), []
    with torch.no_grad():
        for _ in range(500):
            with log.recording():
                layer(x)
            log.update_controllers()
            load = layer.route(x).routing.load()
            worst.append(float(load.max() / load.double().mean()))
    assert worst[0] > 1.2
    assert max(worst[-20:]) < 1.05


def test_deepseek_v3_sequence_loss_is_one_at_uniform_and_counts_sequences_alike():
    layer, x = deepseek(), torch.randn(7, 5, dtype=torch.float64)
    layer.router.scorer.weight.data.zero_()
    decision = layer.route(x, Context(sequence=torch.tensor([0, 0, 0, 0, 0, 1, 1])))
    assert_close(layer.losses["sequence_balance"][1](decision), torch.tensor(1.0, dtype=torch.float64))


def test_deepseek_v3_sequence_loss_counts_without_the_bias():
    layer, x = deepseek(), torch.randn(7, 5, dtype=torch.float64)
    loss = layer.losses["sequence_balance"][1]
    before = loss(layer.route(x))
    layer.router.select.bias[5:] += 9.0
    assert set(layer.route(x).notes["choice"].flatten().tolist()) == {5, 6, 7}
    assert_close(loss(layer.route(x)), before, rtol=0, atol=0)


def test_deepseek_v3_bias_stays_float32_and_takes_no_gradient():
    layer = deepseek().bfloat16()
    assert layer.router.select.bias.dtype == torch.float32
    assert not layer.router.select.bias.requires_grad
