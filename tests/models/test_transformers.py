"""Stock transformers opens our folders and computes the same logits."""

import pytest
import torch
from oracles.tiny_models import tiny_model, tokens_for, train_a_little
from torch.testing import assert_close

from moestro.inference import generate
from moestro.models import save_model

transformers = pytest.importorskip("transformers")

MODELS = {
    "mixtral": ("MixtralForCausalLM", {"num_kv_heads": 2, "num_experts": 6}),
    "mixtral, untied, narrow heads": ("MixtralForCausalLM", {"tied_embeddings": False, "head_dim": 6}),
    "mixtral, qk norm, mixed": ("Qwen3MoeForCausalLM", {"qk_norm": True, "first_dense": 1, "num_kv_heads": 2}),
    "mixtral, full qk norm": ("OlmoeForCausalLM", {"qk_norm": "full", "num_kv_heads": 2}),
    "qwen3": ("Qwen3MoeForCausalLM", {"method": "qwen3", "qk_norm": True, "every": 2, "options": {"top_k": 3}}),
    "qwen3 without norms": ("MixtralForCausalLM", {"method": "qwen3", "options": {"top_k": 3}}),
    "olmoe": ("OlmoeForCausalLM", {"method": "olmoe", "qk_norm": "full", "options": {"top_k": 3}}),
    "olmoe with head norms": (
        "Qwen3MoeForCausalLM",
        {"method": "olmoe", "qk_norm": "head", "options": {"top_k": 3}},
    ),
    "jamba": ("OlmoeForCausalLM", {"method": "jamba", "qk_norm": "full"}),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {
            "method": "deepseek-v3",
            "first_dense": 1,
            "options": {"top_k": 3, "num_groups": 4, "groups_kept": 2, "bias_rate": 0.05},
        },
    ),
    "deepseek-v3, query latent": (
        "DeepseekV3ForCausalLM",
        {
            "method": "deepseek-v3",
            "q_lora_rank": 12,
            "options": {"top_k": 3, "shared_experts": 2, "bias_rate": 0.05},
        },
    ),
    "dense": ("LlamaForCausalLM", {"method": None, "num_kv_heads": 2}),
    "dense, geglu": ("LlamaForCausalLM", {"method": None, "activation": "geglu"}),
    "dense, qk norm": ("Qwen3ForCausalLM", {"method": None, "qk_norm": True}),
    "dense, latent": ("DeepseekV3ForCausalLM", {"method": None, "attention": "latent"}),
}


def stock(model, folder):
    save_model(model, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    """Our model and the stock one from its folder."""
    architecture, arguments = MODELS[request.param]
    model = tiny_model(**arguments)
    if model.config["method"] is not None:
        train_a_little(model)
    if model.config["method"] == "deepseek-v3":
        assert all(block.moe.router.select.bias.any() for block in model.blocks if block.moe)
    theirs = stock(model, tmp_path / "model")
    assert type(theirs).__name__ == architecture
    return model, theirs


def test_logits_and_greedy_text_agree(pair):
    model, theirs = pair
    tokens = tokens_for(model)
    with torch.no_grad():
        logits = theirs(tokens).logits
    assert logits.std() > 0.1
    assert_close(model(tokens), logits, atol=1e-4, rtol=0)
    continued = theirs.generate(tokens[:1, :8], max_new_tokens=64, do_sample=False)[0, 8:].tolist()
    assert len(continued) == 64
    assert list(generate(model, tokens[0, :8], 64)) == continued


@pytest.mark.parametrize("method", ["mixtral", "deepseek-v3"])
def test_the_dense_twin_opens_too(method, tmp_path):
    twin = tiny_model(method, expert_hidden=20).dense_twin(seed=5)
    tokens = tokens_for(twin)
    with torch.no_grad():
        assert_close(twin(tokens), stock(twin, tmp_path / "twin")(tokens).logits, atol=1e-4, rtol=0)


def test_stock_parameters_are_all_ours(tmp_path):
    model = tiny_model("deepseek-v3", first_dense=1)
    theirs = stock(model, tmp_path / "model")
    assert sum(p.numel() for p in theirs.parameters()) == model.parameter_counts().total
