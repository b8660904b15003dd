"""Parameters and FLOPs against independent counts, and the published sizes of released models."""

import pytest
import torch
from oracles.tiny_models import CAUSAL_METHODS, facts, tiny_model, tokens_for
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moestro.models import build_language_model, dense_twin_hidden

# methods that run another number of experts than their nominal k, or whose routers compute more than one product
NOMINAL = {
    "adaptive-gating",
    "automoe",
    "dselect-k",
    "dynamic-top-p",
    "hypermoe",
    "locmoe",
    "m6t-prototyping",
    "mixture-of-tokens",
    "moe-plus-plus",
    "omni-smola",
    "peer",
    "remoe",
    "residual-moe",
    "shazeer-hierarchical",
    "smile",
    "stablemoe",
    "task-based-moe",
    "task-moe",
}
MODELS = {
    **{str(name): {"method": name} for name in (None, *CAUSAL_METHODS) if name not in NOMINAL},
    "switch": {"method": "switch", "options": {"eval_capacity_factor": 8.0}},  # no drops, which would save FLOPs
    "mixed": {"first_dense": 1, "every": 2, "tied_embeddings": False, "num_kv_heads": 2, "activation": "relu"},
    "normed": {"qk_norm": True, "activation": "geglu"},
    "latent": {"method": "deepseek-v3", "q_lora_rank": 12, "value_dim": 5, "options": {"shared_experts": 2}},
}


UNEVEN = {"hypermoe", "moe-plus-plus"}  # experts of several sizes: `active` is a mean, not a sum
COUNTED = {**MODELS, **{name: {"method": name} for name in NOMINAL - UNEVEN}}


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_counts_are_sums_over_parameters(name):
    model = tiny_model(**COUNTED[name])
    counts = model.parameter_counts()
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert sum(counts.components.values()) == counts.total
    assert sum(counts.active_components.values()) == counts.active
    unused = sum(
        (1 - block.moe.top_k / block.moe.experts.num_experts)
        * sum(p.numel() for p in block.moe.experts.parameters())
        for block in model.blocks
        if block.moe is not None
    )
    assert counts.active == counts.total - unused


@pytest.mark.parametrize("name", MODELS)
def test_flops_agree_with_the_counter_of_torch(name):
    model = tiny_model(**MODELS[name], kernel="loop")
    tokens = tokens_for(model, batch=3, length=32)
    # the counter does not know the fused CPU attention; SDPBackend.MATH shows it the products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens, **facts(tokens))
    assert model.flops_per_token(32) == pytest.approx(counter.get_total_flops() / tokens.numel(), rel=0.01)


def test_mixtral_8x7b_has_its_published_size():
    with torch.device("meta"):
        model = build_language_model(
            vocab_size=32000, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, method="mixtral",
            num_experts=8, expert_hidden=14336, tied_embeddings=False,
        )  # fmt: skip
    counts = model.parameter_counts()
    assert counts.total == 46_702_792_704
    assert counts.active == pytest.approx(12.9e9, rel=0.01)


def test_deepseek_v3_has_its_published_size():
    options = {"top_k": 8, "num_groups": 8, "groups_kept": 4}
    with torch.device("meta"):
        model = build_language_model(
            vocab_size=129280, width=7168, num_layers=61, num_heads=128, head_dim=128, method="deepseek-v3",
            options=options, num_experts=256, expert_hidden=2048, dense_hidden=18432, first_dense=3,
            q_lora_rank=1536, kv_lora_rank=512, rope_dim=64, value_dim=128, tied_embeddings=False,
        )  # fmt: skip
    counts = model.parameter_counts()
    assert counts.total == 671_026_404_352
    assert counts.active == pytest.approx(37e9, rel=0.02)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "None"])
def test_the_twin_has_the_active_parameters(name):
    sizes = {"vocab_size": 256, "width": 96, "num_layers": 4, "expert_hidden": 64}
    model = tiny_model(**(sizes | MODELS[name]))
    twin = model.dense_twin(seed=0)
    counts = twin.parameter_counts()
    assert counts.total == counts.active == pytest.approx(model.parameter_counts().active, rel=0.01)
    assert all(block.moe is None and block.ffn.hidden == dense_twin_hidden(model) for block in twin.blocks)
    assert type(twin.blocks[0].attention) is type(model.blocks[0].attention)
    assert twin(tokens_for(twin)).shape == (2, 24, 256)
