"""Assembling a model: placement, defaults, seeds, and what is refused."""

import pytest
import torch
from oracles.tiny_models import CAUSAL_METHODS, tiny_model

from moestro.experts import make_experts
from moestro.methods import all_methods
from moestro.models import LatentAttention, build_language_model

SIZES = {"vocab_size": 64, "width": 32, "num_layers": 4, "num_heads": 4}


def sparse_layers(**arguments):
    model = build_language_model(**SIZES, **arguments)
    return [index for index, block in enumerate(model.blocks) if block.moe is not None]


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"first_dense": 1}, [1, 2, 3]),
        ({"every": 2}, [1, 3]),
        ({"first_dense": 1, "every": 2}, [2]),
        ({"method": None}, []),
    ],
)
def test_experts_go_where_they_are_asked_for(arguments, layers):
    assert sparse_layers(**arguments) == layers


@pytest.mark.parametrize("name", sorted(set(all_methods()) - set(CAUSAL_METHODS)))
def test_methods_that_look_ahead_even_in_evaluation_are_refused_with_the_reason(name):
    layer = all_methods()[name].build(make_experts(8, SIZES["width"], 8))
    if layer.causal_evaluation:  # base-layers and others have a causal rule for evaluation
        assert build_language_model(**SIZES, method=name).blocks[0].moe is not None
        return
    with pytest.raises(ValueError, match=f"{name} is not causal: later tokens change"):
        build_language_model(**SIZES, method=name)


def test_options_that_make_a_method_causal_are_accepted():
    model = build_language_model(**SIZES, method="gshard-top2", options={"capacity_factor": None})
    assert model.blocks[0].moe.causal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 30}, "width=30 is not divisible by num_heads=4"),
        ({"num_kv_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
        ({"num_experts": 4, "options": {"top_k": 5}}, "top_k=5 but there are 4 experts"),
        ({"first_dense": 4}, "leave no layer of 4 with experts"),
        ({"method": "mixtrl"}, "did you mean 'mixtral'"),
        ({"options": {"topk": 2}}, "did you mean 'top_k'"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
        ({"attention": "linear"}, "pass auto, grouped-query or latent"),
        ({"qk_norm": "layer"}, "qk_norm='layer'"),
        ({"attention": "latent", "qk_norm": True}, "leave qk_norm off"),
        ({"attention": "latent", "num_kv_heads": 2}, "must be num_heads=4"),
        ({"num_layers": 0}, "num_layers=0; pass at least 1"),
        ({"head_dim": 5}, "even number"),
        ({"kernel": "magic"}, "unknown kernel 'magic'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_language_model(**(SIZES | arguments))


def test_deepseek_v3_gets_latent_attention_and_others_do_not():
    assert isinstance(tiny_model("deepseek-v3").blocks[0].attention, LatentAttention)
    assert not isinstance(tiny_model("mixtral").blocks[0].attention, LatentAttention)
    assert isinstance(tiny_model("mixtral", attention="latent").blocks[0].attention, LatentAttention)


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second, other = (build_language_model(**SIZES, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.layers[0].attention.qkv.weight, other.layers[0].attention.qkv.weight)


def test_the_stored_config_rebuilds_the_model():
    model = build_language_model(**SIZES, method="deepseek-v3", first_dense=1, seed=3)
    again = build_language_model(**model.config, seed=3)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_experts_and_dense_layers_start_alike_and_routers_as_their_method_says():
    model = build_language_model(**(SIZES | {"width": 128}), first_dense=1, num_experts=4, seed=0)
    dense, moe = model.blocks[0].ffn, model.blocks[1].moe
    for layer in (dense, moe.experts):
        assert layer.gate.std().item() == pytest.approx(1 / 16, rel=0.05)  # 1 / sqrt(2 * 128)
        assert layer.up.std().item() == pytest.approx(1 / 16, rel=0.05)
        assert not layer.down.any(), "what writes into the residual stream starts at zero"
    assert not model.blocks[0].attention.output.weight.any()
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert moe.router.scorer.weight.std().item() == pytest.approx(0.0176, rel=0.1)  # normal(0.02) cut at two sigma
    zero = build_language_model(**SIZES, method="shazeer-noisy-topk").blocks[0].moe.router
    assert not zero.scorer.weight.any()


def test_dense_layers_have_the_active_parameters_of_the_others_by_default():
    model = build_language_model(**SIZES, first_dense=1, expert_hidden=24)
    active = model.blocks[1].moe.parameter_counts().active
    dense = sum(p.numel() for p in model.blocks[0].ffn.parameters())
    assert dense == pytest.approx(active, abs=3 * 32 / 2)
