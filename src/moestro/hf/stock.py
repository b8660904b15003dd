"""From the config.json of a stock model to the arguments that build the same model from our layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.hf.gguf_settings import rope_of
from moestro.hf.stock_blocks import ARGUMENTS, NEVER_HERE
from moestro.models.rope_scaling import KINDS

Config = Mapping[str, Any]
#: what the blocks of these families have and ours do not
MISSING = {
    "afmoe": "attention under a gate, and layers without positions",
    "jamba": "layers of Mamba",
    "lfm2_moe": "layers of convolution",
    "llama4_text": "attention in chunks, and layers without positions whose scores grow with them",
    "longcat_flash": "two attentions in a layer, the experts beside the second",
    "switch_transformers": "encoder and decoder",
    "nllb-moe": "encoder and decoder",
}
ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu"}
NEVER = {"mlp_bias": False, "use_sliding_window": False}


def stock_arguments(config: Config) -> dict[str, Any]:
    """Arguments of `build_language_model` for a stock configuration.

    Raises:
        ValueError: a family whose block we do not have, or a setting that our layers do not compute.
    """
    model_type = config["model_type"]
    if model_type not in ARGUMENTS:
        why = f": {MISSING[model_type]}" if model_type in MISSING else ""
        raise ValueError(f"moestro has no block like {model_type}'s{why}; it builds {', '.join(ARGUMENTS)}")
    _refuse(config, model_type)
    return _common(config) | ARGUMENTS[model_type](config)


def _refuse(config: Config, model_type: str) -> None:
    for key, expected in {**NEVER, **NEVER_HERE[model_type]}.items():
        if config.get(key, expected) in (expected, None) or (key == "sliding_window" and _sees_all(config)):
            continue
        raise ValueError(f"our {model_type} has {key}={expected}, but config.json says {config[key]!r}")
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", *KINDS):
        raise ValueError(
            f"our rotary positions are scaled by {', '.join(KINDS)}, but config.json asks for {kind} scaling"
        )
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
        "rope_theta": float(_rope(config)["rope_theta"]),
        "rope_scaling": _scaling(config),
        "norm_eps": config["rms_norm_eps"],
        "max_length": config["max_position_embeddings"],
    }


def _rope(config: Config) -> Mapping[str, Any]:
    """The rotary settings; Hunyuan's `dynamic` ones with an alpha are a larger base."""
    rope = rope_of(config)
    if rope.get("rope_type") != "dynamic" or not rope.get("alpha"):
        return rope
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {"rope_theta": rope["rope_theta"] * rope["alpha"] ** (head_dim / (head_dim - 2))}


def _sees_all(config: Config) -> bool:
    """Whether no layer uses the window that is named."""
    everywhere = set(config.get("layer_types") or ["unknown"]) == {"full_attention"}
    return config.get("use_sliding_window") is False or everywhere


def _scaling(config: Config) -> dict[str, Any] | None:
    beside = ("rope_theta", "type", "partial_rotary_factor")
    rope = {key: value for key, value in _rope(config).items() if key not in beside}
    return None if rope.get("rope_type", "default") == "default" else rope
