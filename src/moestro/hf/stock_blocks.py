"""What each family's config.json means in our words: routing, experts and attention of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from moestro.hf.gguf_settings import rope_of

Config = Mapping[str, Any]


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
    return _first_and_every(number, sparse, [(len(dense), 1), (0, step)])


def _first_and_every(number: int, sparse: list[int], ways: list[tuple[int, int]]) -> dict[str, int]:
    """The way in which mixtures lie where they do."""
    for first, every in ways:
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


def _qwen2_moe(config: Config) -> dict[str, Any]:
    if config.get("norm_topk_prob", False):
        raise ValueError("our qwen2_moe has raw weights; this one normalises them (norm_topk_prob)")
    shared = _whole_shared(config, config["shared_expert_intermediate_size"], config["moe_intermediate_size"])
    return {
        "method": "qwen-moe",
        "options": {"top_k": config["num_experts_per_tok"], "shared_experts": shared},
        **_places(config),
        "num_experts": config.get("num_experts", config.get("num_local_experts")),
        "expert_hidden": config["moe_intermediate_size"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "attention_bias": "qkv" if config.get("qkv_bias", True) else "none",
    }


def _whole_shared(config: Config, shared: int, hidden: int) -> int:
    """How many experts are as large as the shared one."""
    if not shared or shared % hidden:
        raise ValueError(
            f"our {config['model_type']} has a shared expert as large as some routed ones of {hidden}, but "
            f"config.json says {shared}"
        )
    return shared // hidden


def _glm4_moe(config: Config) -> dict[str, Any]:
    return {
        **_biased_sigmoid(config),
        "attention": "grouped-query",
        "attention_bias": "qkv" if config.get("attention_bias") else "none",
        "qk_norm": "head" if config.get("use_qk_norm") else "none",
        "rope_dim": _rotated(config, 0.5),
    }


def _minimax_m2(config: Config) -> dict[str, Any]:
    return {
        "method": "deepseek-v3",
        "options": {"top_k": config["num_experts_per_tok"], "route_scale": 1.0, "shared_experts": 0},
        "num_experts": config["num_local_experts"],
        "expert_hidden": config["intermediate_size"],
        "attention": "grouped-query",
        "qk_norm": "full",
        "rope_dim": _rotated(config, config.get("rotary_dim", config["head_dim"]) / config["head_dim"]),
    }


def _rotated(config: Config, default: float) -> int:
    """Rotated features of a head."""
    share = rope_of(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or default
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(head_dim * share)


def _granitemoe(config: Config) -> dict[str, Any]:
    shared = config.get("shared_intermediate_size", 0)
    routing = _softmax(config, normalised=True)
    if shared:
        routing["options"]["shared_experts"] = _whole_shared(config, shared, config["intermediate_size"])
    return {
        **routing,
        "num_experts": config["num_local_experts"],
        "expert_hidden": config["intermediate_size"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "attention_bias": "all" if config.get("attention_bias") else "none",
        "attention_scale": float(config.get("attention_multiplier", 1.0)),
        "embedding_scale": float(config.get("embedding_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "logit_divisor": float(config.get("logits_scaling", 1.0)),
    }


def _gpt_oss(config: Config) -> dict[str, Any]:
    window, kinds = config.get("sliding_window"), config["layer_types"]
    return {
        "method": "gpt-oss",
        "options": {"top_k": config["num_experts_per_tok"]},
        "num_experts": config.get("num_local_experts", config.get("num_experts")),
        "expert_hidden": config["intermediate_size"],
        "expert_bias": True,
        "activation": "clamped_swiglu",
        "attention_bias": "all" if config.get("attention_bias", True) else "none",
        "sinks": True,
        "windows": [window if kind == "sliding_attention" else None for kind in kinds],
    }


def _hunyuan(config: Config) -> dict[str, Any]:
    return {
        "method": "qwen3",
        "options": {"top_k": _one(config, "moe_topk"), "shared_experts": 1},
        "num_experts": _one(config, "num_experts"),
        "expert_hidden": config["intermediate_size"],
        "qk_norm": "rotated",
        "attention_bias": "all" if config.get("attention_bias") else "none",
    }


def _one(config: Config, key: str) -> int:
    """A number that these configurations may give for each layer."""
    values = set(config[key]) if isinstance(config[key], list) else {config[key]}
    if len(values) > 1:
        raise ValueError(f"our layers are all alike, but config.json says {key}={config[key]}")
    return int(values.pop())


def _phimoe(config: Config) -> dict[str, Any]:
    if config["num_experts_per_tok"] != 2:
        raise ValueError(f"phimoe has 2 experts for a token, but config.json says {config['num_experts_per_tok']}")
    return {
        "method": "sparse-mixer",
        "options": {"top_k": 2, "epsilon": config.get("router_jitter_noise", 0.01)},
        "num_experts": config["num_local_experts"],
        "expert_hidden": config["intermediate_size"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "norm": "layer",
        "attention_bias": "all" if config.get("attention_bias") else "none",
        "head_bias": bool(config.get("lm_head_bias")),
    }


def _ernie4_5_moe(config: Config) -> dict[str, Any]:
    number, interval = config["num_hidden_layers"], config.get("moe_layer_interval", 1)
    start, end = config.get("moe_layer_start_index", 1), config.get("moe_layer_end_index", -1)
    end = number - 1 if end == -1 else end
    sparse = [i for i in range(number) if start <= i <= end and (i + 1) % interval == 0]
    return {
        "method": "ernie-4-5",
        "options": {"top_k": config["moe_k"], "shared_experts": config.get("moe_num_shared_experts", 2)},
        **_first_and_every(number, sparse, [(start, interval), (0, interval)]),
        "num_experts": config["moe_num_experts"],
        "expert_hidden": config["moe_intermediate_size"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "rope_order": "pairs",
    }


def _flex_olmo(config: Config) -> dict[str, Any]:
    return _olmoe(config) | {"norm_place": "after"}


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
        "qwen2_moe": _qwen2_moe,
        "glm4_moe": _glm4_moe,
        "minimax_m2": _minimax_m2,
        "granitemoe": _granitemoe,
        "granitemoeshared": _granitemoe,
        "gpt_oss": _gpt_oss,
        "hunyuan_v1_moe": _hunyuan,
        "phimoe": _phimoe,
        "flex_olmo": _flex_olmo,
        "ernie4_5_moe": _ernie4_5_moe,
        "llama": _dense("none"),
        "qwen3": _dense("head"),
    }
)

_NO_BIAS = {"attention_bias": False}
_PLAIN = {**_NO_BIAS, "sliding_window": None}
#: settings of each `model_type` that must have one value, where they are named at all
NEVER_HERE: Mapping[str, Config] = MappingProxyType(
    {
        **dict.fromkeys(ARGUMENTS, _PLAIN),
        "olmoe": {**_PLAIN, "clip_qkv": None},
        "glm4_moe": {"sliding_window": None},
        "granitemoe": {"sliding_window": None},
        "granitemoeshared": {"sliding_window": None},
        "hunyuan_v1_moe": {"sliding_window": None},
        "phimoe": {"sliding_window": None, "input_jitter_noise": 0.0},
        "minimax_m2": {**_PLAIN, "router_jitter_noise": 0.0},
        "ernie4_5_moe": {"use_bias": False, "sliding_window": None},
        "gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    }
)
