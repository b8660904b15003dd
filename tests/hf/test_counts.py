"""Parameters and FLOPs of a config.json: those of the built model, and those of the table of published models."""

import json

import pytest
import torch
from hf.tiny import FAMILIES, tiny_batch, tiny_config, tiny_model
from oracles.tiny_models import tiny_model as tiny_own_model
from torch.utils.flop_counter import FlopCounterMode

from moestro.cli import main
from moestro.hf.counts import count_config
from moestro.hf.layouts import FAMILIES as TABLE
from moestro.models import save_model

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_built_model(family):
    model = tiny_model(family)
    counts = count_config(model.config.to_dict())
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.total == sum(counts.components.values())
    assert counts.active == sum(counts.active_components.values())
    routed = {n: p.numel() for n, p in model.named_parameters() if ".experts." in n}
    assert counts.components["experts"] == sum(routed.values())
    router = TABLE[model.config.model_type].stores["fused"].router
    routers = {n: p.numel() for n, p in model.named_parameters() if n.endswith((f".{router}", ".router.bias"))}
    statics = sum(p.numel() for n, p in model.named_parameters() if "correction_bias" in n)
    assert counts.components["router"] == sum(routers.values()) + statics
    tiny = tiny_config(family)
    top_k = {"switch_transformers": 1}.get(family, 2)  # of 6 experts; LongCat has 2 more that compute nothing
    if family != "longcat_flash":
        assert counts.active_components["experts"] * 6 == counts.components["experts"] * top_k
    assert counts.total - counts.active == counts.components["experts"] - counts.active_components["experts"]
    assert tiny.model_type == counts.model_type


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "granitemoe"])
def test_flops_are_those_that_pytorch_counts(family):
    model = tiny_model(family, attn_implementation="eager")
    batch = tiny_batch(model, batch=2, length=9)
    del batch["labels"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    counted = counter.get_total_flops()
    # two tiny products turn positions into angles; they are no work of the model
    assert counted == pytest.approx(18 * count_config(model.config.to_dict(), length=9).flops_per_token, rel=5e-3)


LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
LITE = LATENT | {
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "q_lora_rank": None,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
QWEN3 = {"head_dim": 128, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8}
SWITCH = {"d_ff": 3072, "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6, "num_layers": 12}
LLAMA_MOE = {
    "model_type": "llama_moe",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def config(model_type, *sizes, **more):
    """Width, layers, heads, dense hidden size, ids; and the rest by name."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {"model_type": model_type, **dict(zip(names, sizes, strict=False)), **more}


# name: configuration, total and active parameters in units of 10^9 as catalogues of published models give them
PUBLISHED = {
    "Mixtral-8x7B": ({"model_type": "mixtral"}, 46.703, 12.88),
    "Mixtral-8x22B": (config("mixtral", 6144, 56, 48, 16384, 32768), 140.63, 39.161),
    "Grok-1": (
        config(
            "grok-1",
            6144,
            64,
            48,
            32768,
            131072,
            num_key_value_heads=8,
            num_experts=8,
            num_experts_per_tok=2,
            tie_word_embeddings=True,
        ),
        315.685,
        83.757,
    ),
    "DBRX": (
        {
            "model_type": "dbrx",
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "vocab_size": 100352,
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
            "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 5e5},
        },
        131.597,  # 131 596 523 520
        36.47,
    ),
    "Snowflake-Arctic": (
        config(
            "arctic",
            7168,
            35,
            56,
            4864,
            32000,
            num_key_value_heads=8,
            num_local_experts=128,
            num_experts_per_tok=2,
        ),
        478.585,  # with the norm in front of the residual network
        17.319,
    ),
    "DeepSeekMoE-16B": (
        config(
            "deepseek",
            2048,
            28,
            16,
            10944,
            102400,
            moe_intermediate_size=1408,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            first_k_dense_replace=1,
        ),
        16.376,
        2.829,
    ),
    "DeepSeek-V2-Lite": (
        {"model_type": "deepseek_v2", **LITE, "intermediate_size": 10944, "vocab_size": 102400},
        15.706,  # 15 706 484 224
        2.661,
    ),
    "DeepSeek-V2": (
        {
            "model_type": "deepseek_v2",
            **LITE,
            "hidden_size": 5120,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "n_routed_experts": 160,
            "moe_intermediate_size": 1536,
            "intermediate_size": 12288,
            "vocab_size": 102400,
        },
        235.741,
        21.376,
    ),
    "DeepSeek-V3": ({"model_type": "deepseek_v3"}, 671.026, 37.552),
    "Moonlight-16B-A3B": (
        {
            "model_type": "deepseek_v3",
            **LITE,
            "intermediate_size": 11264,
            "vocab_size": 163840,
            "n_group": 1,
            "topk_group": 1,
        },
        15.96,
        2.915,
    ),
    "Kimi-K2": (
        config(
            "deepseek_v3",
            7168,
            61,
            64,
            18432,
            163840,
            num_key_value_heads=64,
            n_routed_experts=384,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
        1026.408,
        32.861,
    ),
    "Qwen1.5-MoE-A2.7B": ({"model_type": "qwen2_moe"}, 14.316, 2.689),
    "Qwen2-57B-A14B": (
        config(
            "qwen2_moe",
            3584,
            28,
            28,
            18944,
            151936,
            num_key_value_heads=4,
            moe_intermediate_size=2560,
            shared_expert_intermediate_size=20480,
            num_experts=64,
            num_experts_per_tok=8,
        ),
        57.409,
        14.249,
    ),
    "Qwen3-30B-A3B": (
        config("qwen3_moe", 2048, 48, 32, 6144, 151936, **QWEN3, moe_intermediate_size=768),
        30.532,
        3.353,
    ),
    "Qwen3-235B-A22B": (
        config("qwen3_moe", 4096, 94, 64, 12288, 151936, **QWEN3, moe_intermediate_size=1536),
        235.094,
        22.191,
    ),
    "OLMoE-1B-7B": ({"model_type": "olmoe", "intermediate_size": 1024}, 6.919, 1.282),
    "Jamba-v0.1": ({"model_type": "jamba"}, 51.57, 12.11),
    "JetMoE-8B": ({"model_type": "jetmoe", "num_hidden_layers": 24}, 8.522, 2.331),
    "LLaMA-MoE-3.0B(2/16)": ({**LLAMA_MOE, "num_experts": 16, "num_selects": 2}, 6.743, 2.955),
    "LLaMA-MoE-3.5B(4/16)": ({**LLAMA_MOE, "num_experts": 16, "num_selects": 4}, 6.743, 3.496),
    "LLaMA-MoE-3.5B(2/8)": ({**LLAMA_MOE, "num_experts": 8, "num_selects": 2}, 6.741, 3.494),
    **{
        f"Switch-Base-{experts}": (
            {"model_type": "switch_transformers", **SWITCH, "num_experts": experts},
            total,
            active,
        )
        for experts, total, active in (
            (8, 0.619, 0.223),
            (16, 1.072, 0.223),
            (32, 1.979, 0.223),
            (64, 3.791, 0.223),
        )
    },
    "Switch-Base-128": ({"model_type": "switch_transformers", **SWITCH, "num_experts": 128}, 7.415, 0.224),
    "Switch-Base-256": ({"model_type": "switch_transformers", **SWITCH, "num_experts": 256}, 14.664, 0.225),
    "NLLB-MoE-54B": (
        {
            "model_type": "nllb-moe",
            "vocab_size": 256206,
            "d_model": 2048,
            "encoder_layers": 24,
            "decoder_layers": 24,
            "encoder_attention_heads": 16,
            "decoder_attention_heads": 16,
            "encoder_ffn_dim": 8192,
            "decoder_ffn_dim": 8192,
            "num_experts": 128,
            "encoder_sparse_step": 4,
            "decoder_sparse_step": 4,
        },
        54.501,
        3.751,
    ),
    "gpt-oss-20b": ({"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}, 20.915, 4.187),
    "gpt-oss-120b": ({"model_type": "gpt_oss"}, 116.829, 5.712),
    "Llama-4-Scout": ({"model_type": "llama4_text", "num_hidden_layers": 48}, 107.77, 17.173),
    "Llama-4-Maverick": (
        {
            "model_type": "llama4_text",
            "num_local_experts": 128,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": False,
        },
        400.712,
        17.185,
    ),
    "Phi-3.5-MoE": ({"model_type": "phimoe"}, 41.873, 6.641),
}


def vision(model_type, *sizes, moe_layers, **more):
    """Width, layers, heads, hidden size, patch, experts; without biases and head, as the catalogue counts."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    frame = dict(zip((*names, "num_experts"), sizes, strict=True))
    moe = {"moe_layers": list(moe_layers), "image_size": 224, "use_bias": False, "num_experts_per_tok": 2}
    return {"model_type": model_type, **frame, **moe, **more}


PUBLISHED |= {
    "V-MoE-S/32-last2": (vision("v-moe", 512, 8, 8, 2048, 32, 32, moe_layers=(5, 7)), 0.157, 0.031),
    "V-MoE-B/16-every2": (vision("v-moe", 768, 12, 12, 3072, 16, 32, moe_layers=range(1, 12, 2)), 0.964, 0.114),
    "V-MoE-L/16-every2": (vision("v-moe", 1024, 24, 16, 4096, 16, 32, moe_layers=range(1, 24, 2)), 3.424, 0.404),
    "V-MoE-H/14-last5": (vision("v-moe", 1280, 32, 16, 5120, 14, 32, moe_layers=range(23, 32, 2)), 2.662, 0.696),
    "V-MoE-H/14-every2": (vision("v-moe", 1280, 32, 16, 5120, 14, 32, moe_layers=range(1, 32, 2)), 7.132, 0.841),
    "SoftMoE-S/16": (vision("soft-moe", 384, 12, 6, 1536, 16, 128, moe_layers=range(6, 12)), 0.921, 0.921),
    "SoftMoE-B/16": (vision("soft-moe", 768, 12, 12, 3072, 16, 128, moe_layers=range(6, 12)), 3.682, 3.682),
    "SoftMoE-L/16": (vision("soft-moe", 1024, 24, 16, 4096, 16, 128, moe_layers=range(12, 24)), 13.089, 13.089),
    "SoftMoE-H/14": (vision("soft-moe", 1280, 32, 16, 5120, 14, 256, moe_layers=range(16, 32)), 54.113, 54.113),
}


SLOW = {
    "Switch-Base-32",
    "Switch-Base-64",
    "Switch-Base-128",
    "Switch-Base-256",
    "Kimi-K2",
    "DeepSeek-V2",
    "NLLB-MoE-54B",
}
NAMES = [pytest.param(name, marks=pytest.mark.nightly) if name in SLOW else name for name in PUBLISHED]


@pytest.mark.parametrize("name", NAMES)
def test_published_models_have_the_published_sizes(name):
    settings, total, active = PUBLISHED[name]
    counts = count_config(settings)
    assert (round(counts.total / 1e9, 3), round(counts.active / 1e9, 3)) == (total, active)


def formula(width, layers, attention, vocab, dense, moe, expert, num_experts):
    """The catalogue's formula: attention, gated networks, routers, two norms a layer, two embeddings; no last norm.

    Args:
        dense: gated dense hidden sizes over all layers.
        moe: layers with experts.
    """
    experts = moe * num_experts * 3 * width * expert
    return (
        layers * attention
        + 3 * width * dense
        + experts
        + moe * width * num_experts
        + 2 * width * layers
        + 2 * vocab * width
    )


def test_three_rows_of_the_catalogue_are_off_in_the_last_digit():
    """The arithmetic of DBRX, DeepSeek-V2-Lite and Arctic, written out: what the catalogue prints, and what is."""
    grouped = 2 * 6144 * 48 * 128 + 2 * 6144 * 8 * 128
    dbrx = formula(6144, 40, grouped, 100352, dense=0, moe=40, expert=10752, num_experts=16)
    assert dbrx == 131_596_517_376  # the catalogue cuts it to 131.596
    assert count_config(PUBLISHED["DBRX"][0]).total == dbrx + 6144  # the last norm

    latent = 2048 * 16 * 192 + 2048 * (512 + 64) + 512 + 512 * 16 * (128 + 128) + 16 * 128 * 2048
    shared = 10944 + 26 * 2 * 1408  # one dense layer, two shared experts in each of the others
    lite = formula(2048, 27, latent, 102400, dense=shared, moe=26, expert=1408, num_experts=64)
    assert lite == 15_706_482_176  # the catalogue says 15.707
    assert count_config(PUBLISHED["DeepSeek-V2-Lite"][0]).total == lite + 2048

    grouped = 2 * 7168 * 56 * 128 + 2 * 7168 * 8 * 128
    arctic = formula(7168, 35, grouped, 32000, dense=35 * 7168, moe=35, expert=4864, num_experts=128)
    assert round(arctic / 1e9, 3) == 478.584  # the catalogue's figure, with two norms a layer
    counts = count_config(PUBLISHED["Snowflake-Arctic"][0])
    assert counts.total == arctic + 35 * 7168 + 7168  # the norm of the dense network, and the last one
    active = arctic - 35 * 126 * 3 * 7168 * 4864
    assert round(active / 1e9, 3) == 17.318
    assert counts.active == active + 36 * 7168


def test_a_vision_model_is_counted_tensor_by_tensor():
    """V-MoE with biases and a head, as it was released: the same as adding up its tensors."""
    settings = vision("v-moe", 8, 2, 2, 12, 16, 3, moe_layers=(1,), use_bias=True, num_classes=5)
    attention, mlp, norms = 4 * (8 * 8 + 8), 2 * 8 * 12 + 12 + 8, 2 * 2 * 8
    embedding = 16 * 16 * 3 * 8 + 8 + 8 + (14 * 14 + 1) * 8
    total = embedding + 2 * (attention + norms) + mlp + (3 * mlp + 8 * 3) + 2 * 8 + 8 * 5 + 5
    counts = count_config(settings)
    assert (counts.total, counts.active) == (total, total - mlp)
    soft = vision("soft-moe", 8, 2, 2, 12, 16, 3, moe_layers=(1,), use_bias=True, slots_per_expert=2)
    total = embedding - 16 + 2 * (attention + norms) + mlp + (3 * mlp + 8 * 3 * 2 + 1) + 2 * 8
    assert (count_config(soft).total, count_config(soft).active) == (total, total)


def test_our_own_models_know_their_counts(tmp_path):
    model = tiny_own_model("switch", activation="relu")
    save_model(model, tmp_path / "model")
    counts, ours = count_config(tmp_path / "model"), model.parameter_counts()
    assert (counts.total, counts.active, counts.components) == (ours.total, ours.active, ours.components)
    assert counts.flops_per_token == model.flops_per_token(2048)


def test_configs_are_files_folders_or_mappings(tmp_path):
    tiny_config("mixtral").save_pretrained(tmp_path)
    expected = count_config(tiny_config("mixtral").to_dict())
    assert count_config(tmp_path) == count_config(tmp_path / "config.json") == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "hal9000"}, "no architecture 'hal9000'; moestro also counts grok-1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; moestro counts models up to 2000"),
        ({"num_local_experts": 2**33}, "num_local_experts=8589934592"),
        ({"hidden_size": 2**40}, "hidden_size=1099511627776"),
        ({"hidden_size": "wide"}, "config.json does not describe a mixtral"),
        ({"num_attention_heads": 0}, "config.json does not describe a mixtral"),
        ({"model_type": "clip"}, "is no language model"),
    ],
)
def test_absurd_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        count_config({"model_type": "mixtral", **changes})


def test_the_command_plans_a_config(tmp_path, capsys):
    tiny_config("deepseek_v3").save_pretrained(tmp_path)
    counts = count_config(tmp_path)
    assert main(["plan", str(tmp_path / "config.json"), "--length", "64"]) == 0
    text = capsys.readouterr().out
    assert f"{counts.total:,}".replace(",", " ") in text
    assert "forward FLOPs per token at 64 tokens" in text
    assert main(["plan", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["active"] == counts.active
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "x.Y"}}))
    assert main(["plan", str(tmp_path)]) == 2
    assert "auto_map" in capsys.readouterr().err
