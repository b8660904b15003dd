"""The arguments of a language model: checked, and every default that depends on others replaced by its value."""

from __future__ import annotations

from typing import Any

from moestro.experts import is_gated
from moestro.methods import all_methods


def resolve(config: dict[str, Any]) -> None:
    """Check the arguments and replace every default that depends on others by its value, in place."""
    for name in ("vocab_size", "width", "num_layers", "num_heads", "num_experts", "every", "max_length"):
        if config[name] < 1:
            raise ValueError(f"{name}={config[name]}; pass at least 1")
    _resolve_heads(config)
    config["qk_norm"] = {False: "none", True: "head"}.get(config["qk_norm"], config["qk_norm"])
    if config["attention"] == "auto":
        config["attention"] = "latent" if config["method"] == "deepseek-v3" else "grouped-query"
    _check_words(config)
    _resolve_attention(config)
    config["expert_hidden"] = config["expert_hidden"] or default_hidden(config["width"], config["activation"])
    if config["method"] is not None and config["options"].get("vocab_size") is None:
        method = all_methods().get(config["method"])
        if method is not None and "vocab_size" in method.options:
            config["options"]["vocab_size"] = config["vocab_size"]


#: the words that an argument takes
WORDS = {
    "qk_norm": ("none", "head", "full", "rotated"),
    "attention": ("auto", "grouped-query", "latent"),
    "attention_bias": ("none", "qkv", "all"),
    "rope_order": ("halves", "pairs"),
    "norm": ("rms", "layer"),
    "norm_place": ("before", "after", "both"),
}
#: what latent attention does not have, by the value that stands for that
NOT_LATENT = {
    "attention_bias": "none",
    "attention_scale": None,
    "windows": None,
    "sinks": False,
    "rope_order": "halves",
}


def _check_words(config: dict[str, Any]) -> None:
    for name, words in WORDS.items():
        if config[name] not in words:
            raise ValueError(f"{name}={config[name]!r}; pass {', '.join(words[:-1])} or {words[-1]}")
    if config["residual_scale"] != 1 and config["norm_place"] != "before":
        raise ValueError(
            f"residual_scale={config['residual_scale']} has no effect under norms that come after "
            f"(norm_place={config['norm_place']!r}); leave one of them out"
        )


def _resolve_heads(config: dict[str, Any]) -> None:
    width, num_heads = config["width"], config["num_heads"]
    if config["head_dim"] is None:
        if width % num_heads:
            raise ValueError(
                f"width={width} is not divisible by num_heads={num_heads}; change one or pass head_dim"
            )
        config["head_dim"] = width // num_heads
    config["num_kv_heads"] = config["num_kv_heads"] or num_heads
    if num_heads % config["num_kv_heads"]:
        raise ValueError(
            f"num_heads={num_heads} is not divisible by num_kv_heads={config['num_kv_heads']}; "
            "every key-value head serves an equal group of query heads"
        )


def _resolve_attention(config: dict[str, Any]) -> None:
    head_dim = config["head_dim"]
    if config["attention"] != "latent":
        _resolve_grouped_query(config)
        return
    if config["qk_norm"] != "none":
        raise ValueError(
            "latent attention normalises its latents, so qk_norm has no meaning there; leave qk_norm off"
        )
    if config["num_kv_heads"] != config["num_heads"]:
        raise ValueError(
            f"latent attention gives every head its own keys, so num_kv_heads={config['num_kv_heads']} must be "
            f"num_heads={config['num_heads']}; leave num_kv_heads out"
        )
    for name, absent in NOT_LATENT.items():
        if config[name] != absent:
            raise ValueError(f"{name}={config[name]!r} is for grouped-query attention; latent attention has none")
    config["kv_lora_rank"] = config["kv_lora_rank"] or 2 * head_dim
    config["rope_dim"] = config["rope_dim"] or max(2, head_dim // 4 * 2)
    config["value_dim"] = config["value_dim"] or head_dim


def _resolve_grouped_query(config: dict[str, Any]) -> None:
    head_dim, rope_dim, windows = config["head_dim"], config["rope_dim"], config["windows"]
    if rope_dim is not None and not 0 < rope_dim <= head_dim:
        raise ValueError(f"rope_dim={rope_dim} but a head has {head_dim} features; pass 2 to {head_dim}")
    if windows is None:
        return
    if len(windows) != config["num_layers"] or any(window is not None and window < 1 for window in windows):
        raise ValueError(
            f"windows={list(windows)}; pass a number of positions or None for each of the {config['num_layers']} "
            "layers"
        )
    config["windows"] = list(windows)


def default_hidden(width: int, activation: str) -> int:
    """Hidden size at which a feed-forward layer has 8 width^2 parameters, in eighths when gated."""
    return max(8, round(width / 3) * 8) if is_gated(activation) else 4 * width


def feed_forward_size(width: int, hidden: int, activation: str) -> int:
    """Parameters of a feed-forward layer without biases."""
    return (3 if is_gated(activation) else 2) * width * hidden
