"""Tiny random transformers models of every supported family, without a download."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

NUM_EXPERTS, TOP_K = 6, 2
TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FRAME = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Tiny:
    """How to build a family tiny.

    Attributes:
        model: class name in transformers.
        config: class name of its configuration.
        width, hidden, experts, top_k: the configuration's names of model width, expert hidden size, expert count
            and experts per token ("" = not configurable).
        more: other settings.
    """

    model: str
    config: str
    width: str = "hidden_size"
    hidden: str = "intermediate_size"
    experts: str = "num_local_experts"
    top_k: str = "num_experts_per_tok"
    more: dict[str, Any] = field(default_factory=dict)


def _groups(num_groups: int, groups_kept: int) -> dict[str, Any]:
    return {"n_group": num_groups, "topk_group": groups_kept}


DENSE = {"intermediate_size": 24}  # of the layers without experts
FINE = {"hidden": "moe_intermediate_size", "experts": "num_experts"}
DEEPSEEK = {"hidden": "moe_intermediate_size", "experts": "n_routed_experts"}
TINY: dict[str, Tiny] = {
    "mixtral": Tiny("MixtralForCausalLM", "MixtralConfig"),
    "phimoe": Tiny("PhimoeForCausalLM", "PhimoeConfig", more={"router_jitter_noise": 0.5}),
    "minimax_m2": Tiny("MiniMaxM2ForCausalLM", "MiniMaxM2Config", more={"head_dim": 8}),
    "qwen2_moe": Tiny(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", **FINE, more={"shared_expert_intermediate_size": 12}
    ),
    "qwen3_moe": Tiny(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **FINE, more={"norm_topk_prob": True, "head_dim": 8}
    ),
    "olmoe": Tiny("OlmoeForCausalLM", "OlmoeConfig", experts="num_experts"),
    "flex_olmo": Tiny("FlexOlmoForCausalLM", "FlexOlmoConfig", experts="num_experts"),
    "deepseek_v2": Tiny(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        **DEEPSEEK,
        more={**LATENT, "topk_method": "group_limited_greedy", **_groups(3, 2), "first_k_dense_replace": 1},
    ),
    "deepseek_v3": Tiny(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        **DEEPSEEK,
        more={**LATENT, **_groups(3, 2), "first_k_dense_replace": 1, "num_mtp_layers": 0},
    ),
    "glm4_moe": Tiny(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        **DEEPSEEK,
        more={**_groups(3, 2), "first_k_dense_replace": 1, "head_dim": 8, "num_mtp_layers": 0},
    ),
    "dots1": Tiny(
        "Dots1ForCausalLM",
        "Dots1Config",
        **DEEPSEEK,
        more={**_groups(1, 1), "n_shared_experts": 1, "norm_topk_prob": True, "first_k_dense_replace": 1},
    ),
    "gpt_oss": Tiny(
        "GptOssForCausalLM",
        "GptOssConfig",
        more={"head_dim": 8, "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "granitemoe": Tiny("GraniteMoeForCausalLM", "GraniteMoeConfig"),
    "granitemoeshared": Tiny(
        "GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", more={"shared_intermediate_size": 12}
    ),
    "jamba": Tiny(
        "JambaForCausalLM",
        "JambaConfig",
        experts="num_experts",
        more={
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "mamba_d_state": 4,
        },
    ),
    "lfm2_moe": Tiny(
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        **FINE,
        more={"num_dense_layers": 0, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    ),
    "afmoe": Tiny(
        "AfmoeForCausalLM",
        "AfmoeConfig",
        **FINE,
        more={"num_dense_layers": 0, "num_shared_experts": 1, "head_dim": 8, "sliding_window": 8},
    ),
    "ernie4_5_moe": Tiny(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        hidden="moe_intermediate_size",
        experts="moe_num_experts",
        top_k="moe_k",
        more={"moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    ),
    "hunyuan_v1_moe": Tiny(
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        experts="num_experts",
        top_k="moe_topk",
        more={"head_dim": 8},
    ),
    "llama4_text": Tiny(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        more={"intermediate_size_mlp": 24, "head_dim": 8, "attention_chunk_size": 32},
    ),
    "longcat_flash": Tiny(
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        hidden="expert_ffn_hidden_size",
        experts="n_routed_experts",
        top_k="moe_topk",
        more={**LATENT, "num_layers": 2, "zero_expert_num": 2, "ffn_hidden_size": 24, "head_dim": 4},
    ),
    "switch_transformers": Tiny(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        width="d_model",
        hidden="d_ff",
        experts="num_experts",
        top_k="",
        more={
            "d_kv": 8,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "num_heads": 4,
            "expert_capacity": 5,
            "dropout_rate": 0.0,
            "router_jitter_noise": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
    "nllb_moe": Tiny(
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        width="d_model",
        hidden="encoder_ffn_dim",
        experts="num_experts",
        top_k="",
        more={
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
            "decoder_ffn_dim": 10,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "moe_token_dropout": 0.0,
            "expert_capacity": 8,
            "moe_eval_capacity_token_fraction": 0.0,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
        },
    ),
}
FAMILIES = tuple(TINY)


def tiny_config(
    family: str, width: int = 24, hidden: int = 10, num_experts: int = NUM_EXPERTS, top_k: int = TOP_K, **more: Any
) -> Any:
    """A small configuration of a family; `more` overrides any of its settings.

    The default hidden size of 10 is no multiple of 16 bytes: the default experts of transformers refuse it.
    """
    tiny = TINY[family]
    frame: dict[str, Any] = {} if tiny.width == "d_model" else FRAME
    frame = frame if tiny.hidden == "intermediate_size" or not frame else {**frame, **DENSE}
    sizes = {tiny.width: width, tiny.hidden: hidden, tiny.experts: num_experts, tiny.top_k: top_k}
    sizes.pop("", None)
    config = getattr(transformers, tiny.config)
    return config(**{**TOKENS, **frame, **sizes, **tiny.more, **more})


def tiny_model(family: str, *, experts: str | None = "eager", seed: int = 0, **settings: Any) -> Any:
    """A random model of a family in evaluation mode, whose routers and experts are far from uniform.

    Args:
        family: key of `TINY`.
        experts: experts implementation; None = the default of transformers.
        seed: of the weights.
        settings: see `tiny_config`.
    """
    torch.manual_seed(seed)
    config = tiny_config(family, **settings)
    if experts is not None:
        config._experts_implementation = experts
    model = getattr(transformers, TINY[family].model)(config)
    randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights of standard deviation 0.2, routers 0.5, norms near one, selection biases small."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or "inv_freq" in name or "rotary" in name or "A_log" in name:
            continue
        if "correction_bias" in name or "expert_bias" in name:
            tensor.normal_(0.0, 0.05)
        elif "norm" in name and tensor.dim() == 1:
            tensor.normal_(1.0, 0.1)
        elif tensor.dim() >= 2 or name.endswith("bias"):
            router = any(part in name for part in (".gate.w", ".router.", ".gate.gate"))
            tensor.normal_(0.0, 0.5 if router else 0.2)


def tiny_batch(model: Any, batch: int = 2, length: int = 9, seed: int = 0, padding: int = 0) -> dict[str, Tensor]:
    """Token ids, labels and an attention mask; the last `padding` tokens of the first sequence are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    if padding:
        mask[0, -padding:] = 0
        ids[0, -padding:] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
