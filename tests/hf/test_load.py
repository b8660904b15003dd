"""Stock folders in our layers and back, and models of our own in transformers' Auto classes."""

import json

import pytest
import torch
from hf.tiny import tiny_model
from oracles.tiny_models import tiny_model as tiny_own_model
from oracles.tiny_models import tokens_for, train_a_little
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import moestro.hf
from moestro.hf.convert import convert
from moestro.hf.loading import load, save_pretrained
from moestro.models import load_model, save_model

transformers = pytest.importorskip("transformers")

LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}
ALPHA = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}
SCALED = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.22,
    "logits_scaling": 49.0,
}
STOCK = {
    "mixtral": {},
    "mixtral, narrow heads, tied": {"head_dim": 4, "tie_word_embeddings": True},
    "qwen3_moe": {},
    "qwen3_moe, raw weights, dense first": {"norm_topk_prob": False, "mlp_only_layers": [0]},
    "qwen3_moe, every second": {"decoder_sparse_step": 2},
    "olmoe": {},
    "olmoe, normalised": {"norm_topk_prob": True},
    "deepseek_v3": {},
    "dots1": {},
    "dots1, groups": {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5},
    "deepseek_v2": {},
    "deepseek_v2, greedy, no query latent": {**LATENT, "topk_method": "greedy", "routed_scaling_factor": 16.0},
    "deepseek_v3, no query latent": {**LATENT, "n_shared_experts": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v3, longer": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    "deepseek_v2, longer": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    "qwen3_moe, longer": {"rope_parameters": YARN},
    "mixtral, longer": {"rope_parameters": LLAMA3},
    "olmoe, longer": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "qwen2_moe": {"shared_expert_intermediate_size": 20},
    "qwen2_moe, no biases, dense first": {
        "shared_expert_intermediate_size": 10,
        "qkv_bias": False,
        "mlp_only_layers": [0],
    },
    "glm4_moe": {},
    "glm4_moe, biases and norms": {"attention_bias": True, "use_qk_norm": True, "n_group": 1, "topk_group": 1},
    "minimax_m2": {},
    "minimax_m2, partly rotated": {"rotary_dim": 4},
    "granitemoe": {},
    "granitemoe, scaled": {**SCALED, "attention_bias": True},
    "granitemoeshared": {**SCALED, "shared_intermediate_size": 20},
    "gpt_oss": {},
    "gpt_oss, longer, no biases": {"rope_parameters": {**YARN, "truncate": False}, "attention_bias": False},
    "hunyuan_v1_moe": {},
    "hunyuan_v1_moe, alpha, biases": {"attention_bias": True, "rope_parameters": ALPHA},
    "phimoe": {},
    "phimoe, biases": {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.01},
    "flex_olmo": {},
    "ernie4_5_moe": {},
    "ernie4_5_moe, dense first, unshared": {"moe_layer_start_index": 1, "moe_num_shared_experts": 0},
    "ernie4_5_moe, every second": {"num_hidden_layers": 4, "moe_layer_interval": 2},
    "flex_olmo, normalised": {"norm_topk_prob": True},
}


def save_stock(name, folder, **more):
    model = tiny_model(name.split(",")[0], **STOCK.get(name, {}), **more)
    model.save_pretrained(folder, max_shard_size=20_000)
    return model


def tensors_of(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_same_tensors(first, second):
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", STOCK)
def test_stock_models_compute_the_same_in_our_layers_and_go_back(name, tmp_path):
    theirs = save_stock(name, tmp_path / "stock")
    ours = load(tmp_path / "stock")
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert_close(ours(tokens), expected, atol=2e-5, rtol=1e-5)
    saved = save_pretrained(ours, tmp_path / "back", like=tmp_path / "stock")
    assert saved.stock
    assert_same_tensors(tmp_path / "stock", tmp_path / "back")
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("stock", "back"))
    assert before["model_type"] == after["model_type"]
    assert before["eos_token_id"] == after["eos_token_id"]
    again = type(theirs).from_pretrained(tmp_path / "back", experts_implementation="eager")
    fresh = type(theirs).from_pretrained(tmp_path / "stock", experts_implementation="eager")
    for model in (again, fresh):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, fresh(tokens).logits)


@pytest.mark.parametrize("name", STOCK)
def test_stock_models_decode_what_they_compute(name, tmp_path):
    from moestro.inference import generate

    save_stock(name, tmp_path / "stock")
    model = load(tmp_path / "stock")
    tokens = torch.randint(64, (2, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, cache = model(tokens), model.new_cache(2)
        steps = [model(part, cache=cache) for part in tokens.split([9, 1, 1, 3], dim=1)]
        assert_close(torch.cat(steps, 1), expected, atol=2e-5, rtol=1e-5)
        text = tokens[0].tolist()
        for token in generate(model, tokens[0], 6):
            logits = model(torch.tensor([text]))[0, -1]
            assert logits[token] >= logits.max() - 1e-4
            text.append(token)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("mixtral", "fused"),
        ("mixtral", "mergekit"),
        ("mixtral", "interleaved"),
        ("granitemoe", "fused"),
        ("granitemoe", "w1w2w3"),
        ("gpt_oss", "per-expert"),
    ],
)
def test_any_layout_is_loaded(family, layout, tmp_path):
    save_stock(family, tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / layout, layout)
    expected, found = load(tmp_path / "stock").state_dict(), load(tmp_path / layout).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe, every second", "olmoe", "deepseek_v3", "granitemoeshared", "gpt_oss"]
)
def test_our_own_layout_and_back_without_the_model_in_memory(name, tmp_path):
    save_stock(name, tmp_path / "stock")
    done = convert(tmp_path / "stock", tmp_path / "ours", "moestro")
    assert (done.layout, done.opens) == ("moestro", "moestro")
    tokens = torch.randint(64, (1, 9))
    expected = load(tmp_path / "stock")
    assert torch.equal(load_model(tmp_path / "ours")(tokens), expected(tokens))
    assert torch.equal(load(tmp_path / "ours")(tokens), expected(tokens))
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    assert_same_tensors(tmp_path / "stock", tmp_path / "back")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_a_trained_model_goes_to_gguf_and_back(tmp_path):
    model = tiny_own_model("mixtral", vocab_size=256)
    train_a_little(model, steps=2)
    from moestro.data.tokenizer import ByteTokenizer

    save_model(model, tmp_path / "model", ByteTokenizer())
    convert(tmp_path / "model", tmp_path / "model.gguf", "gguf")
    convert(tmp_path / "model.gguf", tmp_path / "back", "transformers")
    tokens = tokens_for(model)
    assert torch.equal(load(tmp_path / "back")(tokens), model(tokens))


def test_bfloat16_stays(tmp_path):
    tiny_model("olmoe").bfloat16().save_pretrained(tmp_path / "stock")
    model = load(tmp_path / "stock")
    assert model.embedding.weight.dtype == torch.bfloat16
    save_pretrained(model, tmp_path / "back")
    assert_same_tensors(tmp_path / "stock", tmp_path / "back")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("jamba", {}, "no block like jamba's: layers of Mamba; it builds mixtral, qwen3_moe"),
        ("qwen2_moe", {}, "as large as some routed ones of 10, but config.json says 12"),
        ("qwen2_moe", {"norm_topk_prob": True}, "our qwen2_moe has raw weights"),
        ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit=7.0, but config.json says 6.0"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=False, but config.json says True"),
        ("olmoe", {"clip_qkv": 3.0}, "clip_qkv=None, but config.json says 3.0"),
        ("mixtral", {"sliding_window": 4}, "sliding_window=None, but config.json says 4"),
        ("deepseek_v3", {"norm_topk_prob": False}, "normalises its weights"),
        ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3}, r"mixtures in layers \[0, 2\]"),
        (
            "qwen3_moe",
            {"rope_parameters": LONG},
            "scaled by linear, llama3, yarn, but config.json asks for longrope scaling",
        ),
    ],
)
def test_what_our_layers_do_not_compute_is_refused(family, settings, message, tmp_path):
    tiny_model(family, **settings).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "stock")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "stock", tmp_path / "ours", "moestro")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update({"model.norm.bias": torch.zeros(24)}), "no place in our layers for model.norm.bias"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(23)}), r"norm.weight of shape \[23\]"),
    ],
)
def test_tensors_must_be_those_of_the_model(change, message, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "stock")
    tensors = load_file(tmp_path / "stock/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "stock/model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "stock")


METHODS = ["switch", "gpt-oss", "dense-softmax", "hash-layers", None]


@pytest.mark.parametrize("method", METHODS)
def test_auto_classes_open_models_of_our_own(method, tmp_path):
    model = tiny_own_model(method, activation="relu")
    saved = save_model(model, tmp_path / "model")
    assert not saved.stock
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(theirs) is moestro.hf.MoestroForCausalLM
    tokens = tokens_for(model)
    with torch.no_grad():
        out = theirs(tokens, labels=tokens, attention_mask=torch.ones_like(tokens))
    assert torch.equal(out.logits, model(tokens))
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.equal(out.loss, loss)
    theirs.save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "model", tmp_path / "again")


def test_auto_models_generate_what_we_generate(tmp_path):
    from moestro.inference import generate

    model = tiny_own_model("switch", activation="relu")
    save_model(model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype="float32", device_map="cpu"
    )
    tokens = tokens_for(model)[:1, :8]
    expected = list(generate(model, tokens[0], 12))
    assert theirs.generate(tokens, max_new_tokens=12, do_sample=False)[0, 8:].tolist() == expected


def test_padding_changes_nothing(tmp_path):
    model = tiny_own_model("switch", activation="relu")
    save_model(model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = tokens_for(model)
    padded = torch.cat([tokens, torch.zeros_like(tokens[:, :3])], 1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens[:, :3])], 1)
    with torch.no_grad():
        out = theirs(padded, attention_mask=mask).logits
        assert_close(out[:, : tokens.shape[1]], theirs(tokens).logits, atol=1e-5, rtol=0)


def test_auto_models_refuse_what_they_do_not_take(tmp_path):
    save_model(tiny_own_model("switch", activation="relu"), tmp_path / "model")
    auto = transformers.AutoModelForCausalLM
    with pytest.raises(ValueError, match="does not take quantization_config; it takes dtype and device_map"):
        auto.from_pretrained(tmp_path / "model", quantization_config={"a": 1})
    with pytest.raises(ValueError, match='has no "arguments"'):
        auto.from_config(moestro.hf.MoestroConfig())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.num_hidden_layers == 3
    assert isinstance(auto.from_config(config), moestro.hf.MoestroForCausalLM)


def test_no_architecture_is_said_with_its_reasons(tmp_path):
    save_model(tiny_own_model("switch", activation="relu"), tmp_path / "model")
    with pytest.raises(ValueError, match="no architecture of transformers computes this model: not Mixtral"):
        convert(tmp_path / "model", tmp_path / "stock", "transformers")
    with pytest.raises(ValueError, match="becomes one of transformers, not fused"):
        convert(tmp_path / "model", tmp_path / "stock", "fused")


@pytest.mark.parametrize(
    "more", [{}, {"truncate": False}, {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5}]
)
def test_frequencies_of_yarn_are_those_of_transformers_at_released_sizes(more):
    from moestro.models.rope_scaling import rotary_frequencies

    scaling = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, **more}
    config = transformers.GptOssConfig(head_dim=64, rope_parameters={**scaling, "rope_theta": 150000.0})
    expected, magnitude = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    frequency, ours = rotary_frequencies(64, 150000.0, scaling)
    assert_close(frequency, expected, rtol=1e-6, atol=0)
    assert ours == pytest.approx(magnitude)
