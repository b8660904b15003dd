"""The layout of DeepSeek-V3: latent attention, dense layers first, biased selection, shared experts."""

from __future__ import annotations

from typing import Any

from moestro.experts import FeedForward
from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, feed_forward_rules, layer_names, mixture_rules
from moestro.models.layouts.fits import dense_layers, latent, stock_feed_forward
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import biased_sigmoid_top_k
from moestro.models.layouts.rules import Rule, same


def misfit(model: DecoderLM) -> str | None:
    return stock_feed_forward(model) or latent(model) or _dense_layers_first(model) or _routing(model)


def _dense_layers_first(model: DecoderLM) -> str | None:
    dense = dense_layers(model)
    return (
        None if dense == list(range(len(dense))) else f"its dense layers come first, but layers {dense} are dense"
    )


def _routing(model: DecoderLM) -> str | None:
    moes = [block.moe for block in model.blocks if block.moe is not None]
    if not moes:
        return None
    routing = biased_sigmoid_top_k(model)
    if routing is None:
        return "DeepSeek-V3 routes by biased sigmoid scores and top-k"
    if model.config["num_experts"] < 2 * routing.num_groups:
        return "its groups are scored by their two best experts, so each needs two"
    plain = all(isinstance(moe.shared, FeedForward) for moe in moes)
    return None if plain else "it has shared experts without a gate; pass shared_experts >= 1"


def rules(model: DecoderLM) -> list[Rule]:
    table = mixture_rules(model)
    for index, block in enumerate(model.blocks):
        if block.moe is None:
            continue
        ours, theirs = layer_names(index)
        table.append(same(f"{ours}.moe.router.select.bias", f"{theirs}.mlp.gate.e_score_correction_bias"))
        table += feed_forward_rules(f"{ours}.moe.shared", f"{theirs}.mlp.shared_experts")
    return table


def config(model: DecoderLM) -> dict[str, Any]:
    ours, dense = model.config, len(dense_layers(model))
    return (
        common_config(model) | _attention_config(ours) | _routing_config(model) | {"first_k_dense_replace": dense}
    )


def _attention_config(ours: dict[str, Any]) -> dict[str, Any]:
    return {
        "q_lora_rank": ours["q_lora_rank"],
        "kv_lora_rank": ours["kv_lora_rank"],
        "qk_nope_head_dim": ours["head_dim"],
        "qk_rope_head_dim": ours["rope_dim"],
        "v_head_dim": ours["value_dim"],
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


def _routing_config(model: DecoderLM) -> dict[str, Any]:
    moe = next((block.moe for block in model.blocks if block.moe is not None), None)
    if moe is None:
        return {}
    routing = biased_sigmoid_top_k(model)
    assert routing is not None
    assert isinstance(moe.shared, FeedForward)
    return {
        "moe_intermediate_size": model.config["expert_hidden"],
        "n_routed_experts": model.config["num_experts"],
        "num_experts_per_tok": routing.top_k,
        "n_shared_experts": moe.shared.hidden // model.config["expert_hidden"],
        "n_group": routing.num_groups,
        "topk_group": routing.groups_kept,
        "routed_scaling_factor": routing.scale,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


DEEPSEEK_V3 = Layout("DeepSeek-V3", "deepseek_v3", "DeepseekV3ForCausalLM", misfit, rules, config)
