"""From the config.json of a stock model to the arguments that build the same model from our layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from moestro.hf.gguf_settings import rope_of

Config = Mapping[str, Any]
ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu"}
NEVER = {"attention_bias": False, "mlp_bias": False, "sliding_window": None, "use_sliding_window": False}


def stock_arguments(config: Config) -> dict[str, Any]:
    """Arguments of `build_language_model` for a stock configuration.

    Raises:
        ValueError: a family whose block we do not have, or a setting that our layers do not compute.
    """
    model_type = config["model_type"]
    if model_type not in ARGUMENTS:
        raise ValueError(f"moestro has no block like {model_type}'s; it builds {', '.join(ARGUMENTS)}")
    _refuse(config, model_type)
    return _common(config) | ARGUMENTS[model_type](config)


def _refuse(config: Config, model_type: str) -> None:
    never = NEVER | ({"clip_qkv": None} if model_type == "olmoe" else {})
    everywhere = set(config.get("layer_types") or ["unknown"]) == {"full_attention"}
    if config.get("use_sliding_window") is False or everywhere:
        never = {key: value for key, value in never.items() if key != "sliding_window"}
    for key, expected in never.items():
        if config.get(key, expected) not in (expected, None):
            raise ValueError(f"our {model_type} has {key}={expected}, but config.json says {config[key]!r}")
    kind = rope_of(config).get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"our rotary positions are not scaled, but config.json asks for {kind} scaling")
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        raise ValueError(f"hidden_act={config['hidden_act']!r}; moestro builds {', '.join(ACTIVATIONS)}")


def _common(config: Config) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "activation": ACTIVATIONS[config.get("hidden_act", "silu")],
        "dense_hidden": config["intermediate_size"],
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "rope_theta": float(rope_of(config)["rope_theta"]),
        "norm_eps": config["rms_norm_eps"],
        "max_length": config["max_position_embeddings"],
    }


def _softmax(config: Config, normalised: bool) -> dict[str, Any]:
    """The method that routes so, whichever model it was published with."""
    return {"method": "qwen3" if normalised else "olmoe", "options": {"top_k": config["num_experts_per_tok"]}}


def _mixtral(config: Config) -> dict[str, Any]:
    balance = config.get("router_aux_loss_coef", 0.02)
    return {
        "method": "mixtral",
        "options": {"top_k": config["num_experts_per_tok"], "balance": balance},
        "num_experts": config["num_local_experts"],
        "expert_hidden": config["intermediate_size"],
    }


def _qwen3_moe(config: Config) -> dict[str, Any]:
    return {
        **_softmax(config, config.get("norm_topk_prob", False)),
        **_places(config),
        "num_experts": config.get("num_experts", config.get("num_local_experts")),
        "expert_hidden": config["moe_intermediate_size"],
        "qk_norm": "head",
    }


def _places(config: Config) -> dict[str, int]:
    """Which layers are mixtures, in our words: dense ones first, then every n-th."""
    number, step = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or [])
    sparse = [i for i in range(number) if i not in dense and (i + 1) % step == 0]
    for first, every in [(len(dense), 1), (0, step)]:
        if sparse and list(range(first + every - 1, number, every)) == sparse:
            return {"first_dense": first, "every": every}
    raise ValueError(
        f"mixtures in layers {sparse}: moestro builds dense layers first and then a mixture in every n-th layer"
    )


def _olmoe(config: Config) -> dict[str, Any]:
    return {
        **_softmax(config, config.get("norm_topk_prob", False)),
        "num_experts": config.get("num_experts", config.get("num_local_experts")),
        "expert_hidden": config["intermediate_size"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "qk_norm": "full",
    }


def _deepseek_v3(config: Config) -> dict[str, Any]:
    if not config.get("rope_interleave", True):
        raise ValueError("our DeepSeek-V3 turns neighbouring features; this one does not (rope_interleave)")
    return _biased_sigmoid(config) | _latent(config)


def _dots1(config: Config) -> dict[str, Any]:
    return _biased_sigmoid(config) | {"qk_norm": "head", "attention": "grouped-query"}


def _deepseek_v2(config: Config) -> dict[str, Any]:
    limited = config.get("topk_method", "greedy") == "group_limited_greedy"
    return _with_shared(config, "deepseek-v2", groups=limited) | _latent(config)


def _biased_sigmoid(config: Config) -> dict[str, Any]:
    if not config.get("norm_topk_prob", True):
        raise ValueError(f"our {config['model_type']} normalises its weights; this one does not (norm_topk_prob)")
    return _with_shared(config, "deepseek-v3", groups=True)


def _with_shared(config: Config, method: str, groups: bool) -> dict[str, Any]:
    """Dense layers first, then mixtures with shared experts."""
    if not config.get("n_shared_experts"):
        raise ValueError(f"our {config['model_type']} has shared experts; this one has none (n_shared_experts)")
    return {
        "method": method,
        "options": {
            "top_k": config["num_experts_per_tok"],
            "num_groups": (config.get("n_group") or 1) if groups else 1,
            "groups_kept": (config.get("topk_group") or 1) if groups else 1,
            "route_scale": float(config["routed_scaling_factor"]),
            "shared_experts": config["n_shared_experts"],
        },
        "num_experts": config.get("n_routed_experts", config.get("num_local_experts")),
        "expert_hidden": config["moe_intermediate_size"],
        "first_dense": config["first_k_dense_replace"],
    }


def _latent(config: Config) -> dict[str, Any]:
    return {
        "attention": "latent",
        "num_kv_heads": None,
        "head_dim": config["qk_nope_head_dim"],
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "rope_dim": config["qk_rope_head_dim"],
        "value_dim": config["v_head_dim"],
    }


def _dense(qk_norm: str) -> Callable[[Config], dict[str, Any]]:
    return lambda config: {"method": None, "qk_norm": qk_norm}


#: how to build each `model_type`
ARGUMENTS: Mapping[str, Callable[[Config], dict[str, Any]]] = MappingProxyType(
    {
        "mixtral": _mixtral,
        "qwen3_moe": _qwen3_moe,
        "olmoe": _olmoe,
        "deepseek_v3": _deepseek_v3,
        "deepseek_v2": _deepseek_v2,
        "dots1": _dots1,
        "llama": _dense("none"),
        "qwen3": _dense("head"),
    }
)
