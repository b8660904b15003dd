"""config.json from the settings of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any

from moestro.hf.gguf_settings import CONFIG, GATES, LOG_MULTIPLIER, NEXT_IDS
from moestro.hf.gguf_table import ARCHITECTURES

#: what some configurations call the number of experts and their hidden size
NAMES = {
    "mixtral": ("num_local_experts", "intermediate_size"),
    "olmoe": ("num_experts", "intermediate_size"),
    "minimax_m2": ("num_local_experts", "intermediate_size"),
}


def to_config(settings: Mapping[str, Any], tensors: Container[str], where: str) -> dict[str, Any]:
    """config.json from a GGUF file: the one that moestro wrote into it, or one put together from its settings.

    Raises:
        ValueError: an architecture that moestro does not know, or settings that are missing.
    """
    name = settings.get("general.architecture")
    kinds = [kind for kind, row in ARCHITECTURES.items() if row.name == name]
    if len(kinds) > 1:  # as DeepSeek's two do, by their router
        sigmoid = settings.get(f"{name}.expert_gating_func") == GATES["sigmoid"]
        kinds = [kind for kind in kinds if ARCHITECTURES[kind].sigmoid == sigmoid]
    if not kinds or (name == "llama" and not settings.get("llama.expert_count")):
        known = ", ".join(row.name for row in ARCHITECTURES.values())
        raise ValueError(f"{where} holds a {name!r} model; moestro reads mixtures of experts of {known}")
    if CONFIG in settings:
        config = json.loads(settings[CONFIG])
        if isinstance(config, dict) and config.get("model_type") == kinds[0] and "auto_map" not in config:
            return config
        raise ValueError(f"{where}: its {CONFIG} is not that of a {kinds[0]}")
    try:
        of = {key.removeprefix(f"{name}."): value for key, value in settings.items()}
        told = ARCHITECTURES[kinds[0]].told_by
        return _put_together(of, kinds[0], settings) | {key: f"blk.0.{tensor}" in tensors for key, tensor in told}
    except KeyError as error:
        raise ValueError(f"{where} lacks the setting {name}.{error.args[0]}") from None


def _put_together(of: Mapping[str, Any], model_type: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    tokens = settings.get("tokenizer.ggml.tokens")
    config = {
        "model_type": model_type,
        "vocab_size": len(tokens) if tokens else of["vocab_size"],
        "hidden_size": of["embedding_length"],
        "intermediate_size": of["feed_forward_length"],
        "num_hidden_layers": of["block_count"],
        "num_attention_heads": of["attention.head_count"],
        "num_key_value_heads": of["attention.head_count_kv"],
        "max_position_embeddings": of["context_length"],
        "rms_norm_eps": round(of["attention.layer_norm_rms_epsilon"], 12),
        "rope_parameters": _rope_parameters(of, model_type),
        "num_experts_per_tok": of["expert_used_count"],
        **{key: settings.get(f"tokenizer.ggml.{name}_token_id") for key, name in NEXT_IDS.items()},
    }
    hidden = of.get("expert_feed_forward_length", of["feed_forward_length"])
    architecture = ARCHITECTURES[model_type]
    if architecture.dense_first:
        config |= {**architecture.requires, **_dense_first_config(of, hidden)}
    if architecture.latent:
        return config | _latent_config(of)
    head_dim = of.get("attention.key_length", of["embedding_length"] // of["attention.head_count"])
    if not architecture.dense_first:
        experts, size = NAMES.get(model_type, ("num_experts", "moe_intermediate_size"))
        config |= {**architecture.requires, experts: of["expert_count"], size: hidden}
    if model_type in ("mixtral", "qwen3_moe", "dots1", "glm4_moe", "minimax_m2"):
        config["head_dim"] = head_dim
    if architecture.partial:
        config["rope_parameters"]["partial_rotary_factor"] = of["rope.dimension_count"] / head_dim
    if model_type == "qwen2_moe":
        config["shared_expert_intermediate_size"] = of["expert_shared_feed_forward_length"]
    return config


def _rope_parameters(of: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    kind = of.get("rope.scaling.type", "none")
    theta = {"rope_theta": of.get("rope.freq_base", 10000.0)}
    if kind == "none":
        return {"rope_type": "default", **theta}
    latent = ARCHITECTURES[model_type].latent
    if kind != "yarn" or (latent and LOG_MULTIPLIER not in of):
        raise ValueError(f"moestro reads no {kind} rotary positions of {model_type} from GGUF, only default ones")
    original = of["rope.scaling.original_context_length"]
    everywhere = round(of[LOG_MULTIPLIER] * 10, 6) if latent else None
    return {
        "rope_type": "yarn",
        **theta,
        **({"mscale": everywhere, "mscale_all_dim": everywhere} if latent else {}),
        "factor": of["rope.scaling.factor"],
        "original_max_position_embeddings": original,
    }


def _dense_first_config(of: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    return {
        "moe_intermediate_size": hidden,
        "n_routed_experts": of["expert_count"],
        "n_shared_experts": of["expert_shared_count"],
        "n_group": of.get("expert_group_count", 1),
        "topk_group": of.get("expert_group_used_count", 1),
        "routed_scaling_factor": of.get("expert_weights_scale", 1.0),
        "norm_topk_prob": of.get("expert_weights_norm", False),
        "first_k_dense_replace": of.get("leading_dense_block_count", 0),
    }


def _latent_config(of: Mapping[str, Any]) -> dict[str, Any]:
    if "attention.key_length_mla" not in of:
        raise ValueError("moestro reads no DeepSeek GGUF of 2024, whose latents are not split; convert it anew")
    rotated = of["rope.dimension_count"]
    return {
        "num_key_value_heads": of["attention.head_count"],
        "q_lora_rank": of.get("attention.q_lora_rank"),
        "kv_lora_rank": of["attention.kv_lora_rank"],
        "qk_nope_head_dim": of["attention.key_length_mla"] - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": of["attention.value_length_mla"],
    }
