"""What the layouts of released decoder models share: names of embeddings, norms, attention and dense layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from moestro.models.attention import GroupedQueryAttention
from moestro.models.decoder import Attention, DecoderLM
from moestro.models.latent import LatentAttention
from moestro.models.layouts.rules import Rule, per_expert, same, stacked_rows, transposed

HIDDEN_ACT = {"swiglu": "silu", "geglu": "gelu"}
CLAMPED = {"clamped_swiglu": "silu"}  # which gpt-oss alone has, under this name
PROJECTIONS = {name: f"{name}_proj" for name in ("gate", "up", "down")}


def frame_rules(model: DecoderLM) -> list[Rule]:
    """Embeddings and the last norm."""
    rules = [same("embedding.weight", "model.embed_tokens.weight"), *_all_of("norm", "model.norm", model.norm)]
    tied = "head.weight" if model.config["tied_embeddings"] else None
    return [*rules, *(rule for rule in _all_of("head", "lm_head", model.head) if rule.ours[0] != tied)]


#: where layers keep their norms, by `norm_place`
NORM_NAMES = {
    "before": {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "after": {"attention_after": "post_attention_layernorm", "ffn_after": "post_feedforward_layernorm"},
}


def attention_rules(model: DecoderLM, index: int) -> list[Rule]:
    """Both norms and the attention of one layer."""
    ours, theirs = layer_names(index)
    block = model.blocks[index]
    norms = NORM_NAMES[model.config["norm_place"]].items()
    return [
        *(rule for a, b in norms for rule in _all_of(f"{ours}.{a}", f"{theirs}.{b}", getattr(block, a))),
        *_all_of(f"{ours}.attention.output", f"{theirs}.self_attn.o_proj", block.attention.output),
        *_projection_rules(f"{ours}.attention", f"{theirs}.self_attn", block.attention),
    ]


def _all_of(ours: str, theirs: str, module: nn.Module) -> list[Rule]:
    """Weight and, if there is one, bias."""
    return [same(f"{ours}.{name}", f"{theirs}.{name}") for name, _ in module.named_parameters()]


def _projection_rules(ours: str, theirs: str, attention: Attention) -> list[Rule]:
    if isinstance(attention, LatentAttention):
        return _latent_rules(ours, theirs, attention)
    return _grouped_query_rules(ours, theirs, attention)


def _grouped_query_rules(ours: str, theirs: str, attention: GroupedQueryAttention) -> list[Rule]:
    sizes = tuple(n * attention.head_dim for n in (attention.num_heads, *[attention.num_kv_heads] * 2))
    rules = [
        stacked_rows(f"{ours}.qkv.{kind}", tuple(f"{theirs}.{name}_proj.{kind}" for name in "qkv"), sizes)
        for kind, _ in attention.qkv.named_parameters()
    ]
    if attention.sinks is not None:
        rules.append(same(f"{ours}.sinks", f"{theirs}.sinks"))
    names = ("query_layernorm", "key_layernorm") if attention.qk_norm == "rotated" else ("q_norm", "k_norm")
    rules += _all_of(f"{ours}.query_norm", f"{theirs}.{names[0]}", attention.query_norm)
    return rules + _all_of(f"{ours}.key_norm", f"{theirs}.{names[1]}", attention.key_norm)


def _latent_rules(ours: str, theirs: str, attention: LatentAttention) -> list[Rule]:
    names = {
        "latent": "kv_a_proj_with_mqa",
        "latent_norm": "kv_a_layernorm",
        "expand": "kv_b_proj",
    }
    if attention.q_lora_rank is None:
        names["query"] = "q_proj"
    else:
        names |= {"query_down": "q_a_proj", "query_norm": "q_a_layernorm", "query_up": "q_b_proj"}
    return [same(f"{ours}.{ours_}.weight", f"{theirs}.{theirs_}.weight") for ours_, theirs_ in names.items()]


def feed_forward_rules(ours: str, theirs: str) -> list[Rule]:
    """A dense gated feed-forward network."""
    return [transposed(f"{ours}.{name}", f"{theirs}.{other}.weight") for name, other in PROJECTIONS.items()]


def expert_rules(ours: str, theirs: str, num_experts: int, names: dict[str, str]) -> list[Rule]:
    """A bank of gated experts, one tensor per expert and matrix on disk; `names` are theirs by ours."""
    return [
        per_expert(f"{ours}.{name}", f"{theirs}.{{}}.{other}.weight", num_experts) for name, other in names.items()
    ]


def mixture_rules(
    model: DecoderLM,
    module: str = "mlp",
    names: dict[str, str] = PROJECTIONS,
    router: str = "gate",
    experts: Callable[[str, str, int, dict[str, str]], list[Rule]] = expert_rules,
) -> list[Rule]:
    """A whole model: frame, attention, dense layers, and routers and experts under `module`.

    Args:
        model: the model.
        module: theirs of router and experts, below the layer.
        names: theirs of an expert's matrices, by ours.
        router: theirs of the router, below `module`.
        experts: ours and theirs of a bank, its size and `names` -> rules.
    """
    rules = frame_rules(model)
    for index, block in enumerate(model.blocks):
        ours, theirs = layer_names(index)
        theirs = f"{theirs}.{module}"
        rules += attention_rules(model, index)
        if block.moe is None:
            rules += feed_forward_rules(f"{ours}.ffn", theirs)
        else:
            rules.append(same(f"{ours}.moe.router.scorer.weight", f"{theirs}.{router}.weight"))
            num_experts = block.moe.experts.num_experts
            rules += experts(f"{ours}.moe.experts", f"{theirs}.experts", num_experts, names)
    return rules


def layer_names(index: int) -> tuple[str, str]:
    """Names of one layer, ours and theirs."""
    return f"layers.{index}", f"model.layers.{index}"


def common_config(model: DecoderLM) -> dict[str, Any]:
    """The entries of config.json that all stock layouts take."""
    config = model.config
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["width"],
        "intermediate_size": config["dense_hidden"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": config["num_kv_heads"],
        "hidden_act": (HIDDEN_ACT | CLAMPED)[config["activation"]],
        "max_position_embeddings": config["max_length"],
        "rms_norm_eps": config["norm_eps"],
        "rope_parameters": rope_parameters(model),
        "tie_word_embeddings": config["tied_embeddings"],
    }


def partial_rope(model: DecoderLM) -> dict[str, Any]:
    """The same, and the share of a head that is rotated."""
    config = model.config
    share = (config["rope_dim"] or config["head_dim"]) / config["head_dim"]
    return {"rope_parameters": {**rope_parameters(model), "partial_rotary_factor": share}}


def rope_parameters(model: DecoderLM) -> dict[str, Any]:
    """The base of the rotary positions and how they are scaled."""
    config = model.config
    return {"rope_type": "default", **(config["rope_scaling"] or {}), "rope_theta": config["rope_theta"]}
