"""What the layouts of released decoder models share: names of embeddings, norms, attention and dense layers."""

from __future__ import annotations

from typing import Any

from moestro.models.attention import GroupedQueryAttention
from moestro.models.decoder import Attention, Block, DecoderLM
from moestro.models.latent import LatentAttention
from moestro.models.layouts.rules import Rule, per_expert, same, stacked_rows, transposed

HIDDEN_ACT = {"swiglu": "silu", "geglu": "gelu"}
PROJECTIONS = {name: f"{name}_proj" for name in ("gate", "up", "down")}


def frame_rules(model: DecoderLM) -> list[Rule]:
    """Embeddings and the last norm."""
    rules = [same("embedding.weight", "model.embed_tokens.weight"), same("norm.weight", "model.norm.weight")]
    return rules if model.config["tied_embeddings"] else [*rules, same("head.weight", "lm_head.weight")]


def attention_rules(index: int, block: Block) -> list[Rule]:
    """Both norms and the attention of one layer."""
    ours, theirs = layer_names(index)
    return [
        same(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"),
        same(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        same(f"{ours}.attention.output.weight", f"{theirs}.self_attn.o_proj.weight"),
        *_projection_rules(f"{ours}.attention", f"{theirs}.self_attn", block.attention),
    ]


def _projection_rules(ours: str, theirs: str, attention: Attention) -> list[Rule]:
    if isinstance(attention, LatentAttention):
        return _latent_rules(ours, theirs, attention)
    return _grouped_query_rules(ours, theirs, attention)


def _grouped_query_rules(ours: str, theirs: str, attention: GroupedQueryAttention) -> list[Rule]:
    sizes = tuple(n * attention.head_dim for n in (attention.num_heads, *[attention.num_kv_heads] * 2))
    names = tuple(f"{theirs}.{name}_proj.weight" for name in "qkv")
    rules = [stacked_rows(f"{ours}.qkv.weight", names, sizes)]
    if attention.qk_norm != "none":
        rules.append(same(f"{ours}.query_norm.weight", f"{theirs}.q_norm.weight"))
        rules.append(same(f"{ours}.key_norm.weight", f"{theirs}.k_norm.weight"))
    return rules


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


def mixture_rules(model: DecoderLM, module: str = "mlp", names: dict[str, str] = PROJECTIONS) -> list[Rule]:
    """A whole model: frame, attention, dense layers, and routers and experts under `module`."""
    rules = frame_rules(model)
    for index, block in enumerate(model.blocks):
        ours, theirs = layer_names(index)
        theirs = f"{theirs}.{module}"
        rules += attention_rules(index, block)
        if block.moe is None:
            rules += feed_forward_rules(f"{ours}.ffn", theirs)
        else:
            rules.append(same(f"{ours}.moe.router.scorer.weight", f"{theirs}.gate.weight"))
            num_experts = block.moe.experts.num_experts
            rules += expert_rules(f"{ours}.moe.experts", f"{theirs}.experts", num_experts, names)
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
        "hidden_act": HIDDEN_ACT[config["activation"]],
        "max_position_embeddings": config["max_length"],
        "rms_norm_eps": config["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "tie_word_embeddings": config["tied_embeddings"],
    }
