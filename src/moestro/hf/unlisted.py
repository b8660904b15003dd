"""Released models that transformers has no architecture for, counted in closed form from a config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

Counted = tuple[str, int, int, int]  # component, total, active, FLOPs of a token
Config = Mapping[str, Any]


def _matrices(component: str, total: int, active: int | None = None) -> Counted:
    active = total if active is None else active
    return component, total, active, 2 * active


def _vectors(component: str, total: int) -> Counted:
    return component, total, total, 0


def _frame(config: Config, norms: int) -> Iterator[Counted]:
    """Embeddings, grouped-query attention, and `norms` RMS norms in a layer beside the last one."""
    width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads
    table = config["vocab_size"] * width
    if not config.get("tie_word_embeddings", False):
        yield _vectors("embedding", table)
    yield _matrices("embedding", table)
    yield _matrices("attention", layers * 2 * width * head_dim * (heads + kv_heads))
    yield _vectors("norm", (norms * layers + 1) * width)


def _experts(config: Config, layers: int, hidden: int, num_experts: int, top_k: int) -> Iterator[Counted]:
    """Routers, and banks of gated experts."""
    width = config["hidden_size"]
    yield _matrices("router", layers * width * num_experts)
    one = 3 * width * hidden * layers
    yield _matrices("experts", one * num_experts, one * top_k)


def _grok(config: Config) -> Iterator[Counted]:
    """Grok-1: four norms in a layer."""
    yield from _frame(config, norms=4)
    top_k = config.get("num_experts_per_tok") or config["num_selected_experts"]
    yield from _experts(
        config, config["num_hidden_layers"], config["intermediate_size"], config["num_experts"], top_k
    )


def _arctic(config: Config) -> Iterator[Counted]:
    """Arctic: a gated dense network as wide as the model beside the experts of every layer, with its own norm."""
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    yield from _frame(config, norms=3)
    yield _matrices("dense", 3 * width * width * layers)
    yield from _experts(
        config, layers, config["intermediate_size"], config["num_local_experts"], config["num_experts_per_tok"]
    )


def _deepseek(config: Config) -> Iterator[Counted]:
    """DeepSeekMoE: dense layers first, shared experts beside the routed ones."""
    layers, width, hidden = config["num_hidden_layers"], config["hidden_size"], config["moe_intermediate_size"]
    dense = config.get("first_k_dense_replace", 0)
    yield from _frame(config, norms=2)
    yield _matrices("dense", 3 * width * config["intermediate_size"] * dense)
    yield _matrices("shared", 3 * width * hidden * (config.get("n_shared_experts") or 0) * (layers - dense))
    yield from _experts(config, layers - dense, hidden, config["n_routed_experts"], config["num_experts_per_tok"])


def _llama_moe(config: Config) -> Iterator[Counted]:
    """LLaMA-MoE: the feed-forward networks of a Llama cut into experts.

    The gate is two layers (width to experts, experts to experts) and a third matrix scales its noise.
    """
    layers, width, num_experts = config["num_hidden_layers"], config["hidden_size"], config["num_experts"]
    yield from _frame(config, norms=2)
    yield _matrices("router", layers * num_experts * (width + num_experts))
    hidden = config["intermediate_size"] // num_experts
    yield from _experts(config, layers, hidden, num_experts, config["num_selects"])


def _vision(config: Config) -> Iterator[Counted]:
    """What the vision transformers share: patches, class token, positions, attention, dense layers, norms, head.

    They were released without a config.json; it has `image_size`, `patch_size`, `moe_layers` (their numbers),
    `num_classes` (0 = no head) and `use_bias` (True if not there; norms and patches always have biases).
    """
    width, layers, hidden = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    biased = bool(config.get("use_bias", True))
    patch, classes = config["patch_size"] ** 2 * 3, config.get("num_classes", 0)
    yield _matrices("embedding", patch * width)
    yield _vectors("embedding", width + (patches(config) + 2 * bool(config.get("class_token"))) * width)
    yield _matrices("attention", layers * 4 * width * width)
    yield _vectors("attention", layers * 4 * width * biased)
    dense = layers - len(config["moe_layers"])
    yield _matrices("dense", dense * 2 * width * hidden + classes * width)
    yield _vectors("dense", dense * (hidden + width) * biased + classes)
    yield _vectors("norm", (2 * layers + 1) * 2 * width)


def patches(config: Config) -> int:
    """Tokens that an image becomes."""
    return int(config["image_size"] // config["patch_size"]) ** 2


def _v_moe(config: Config) -> Iterator[Counted]:
    """V-MoE (Riquelme et al. 2021): a class token, top-k routers, experts of two matrices."""
    yield from _vision({**config, "class_token": True})
    moe, num_experts, top_k = len(config["moe_layers"]), config["num_experts"], config["num_experts_per_tok"]
    width, hidden = config["hidden_size"], config["intermediate_size"]
    yield _matrices("router", moe * width * num_experts)
    one = moe * 2 * width * hidden
    yield _matrices("experts", one * num_experts, one * top_k)
    bias = moe * (width + hidden) * bool(config.get("use_bias", True))
    yield "experts", bias * num_experts, bias * top_k, 0


def _soft_moe(config: Config) -> Iterator[Counted]:
    """Soft MoE (Puigcerver et al. 2023): every expert works on `slots_per_expert` mixtures of all tokens.

    All parameters are active; a token's share of the work is that of `slots / tokens` rows, and three products with
    every slot (logits, dispatch, combine).
    """
    yield from _vision(config)
    moe, num_experts, slots = len(config["moe_layers"]), config["num_experts"], config.get("slots_per_expert", 1)
    width, hidden = config["hidden_size"], config["intermediate_size"]
    router = moe * (width * num_experts * slots + 1)  # a vector for each slot and a scale
    yield "router", router, router, 3 * 2 * moe * width * num_experts * slots
    matrices = moe * num_experts * 2 * width * hidden
    yield "experts", matrices, matrices, 2 * matrices * slots // patches(config)
    yield _vectors("experts", moe * num_experts * (width + hidden) * bool(config.get("use_bias", True)))


#: how to count a `model_type`
UNLISTED: Mapping[str, Callable[[Config], Iterator[Counted]]] = MappingProxyType(
    {
        "grok-1": _grok,
        "arctic": _arctic,
        "deepseek": _deepseek,
        "llama_moe": _llama_moe,
        "v-moe": _v_moe,
        "soft-moe": _soft_moe,
    }
)
