"""The layout of Qwen3-MoE: per-head query and key norms, dense layers anywhere."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import (
    PROJECTIONS,
    attention_rules,
    common_config,
    expert_rules,
    feed_forward_rules,
    frame_rules,
    layer_names,
)
from moestro.models.layouts.fits import dense_layers, grouped_query, qk_norm_is, stock_feed_forward
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import softmax_top_k
from moestro.models.layouts.rules import Rule, same


def misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or qk_norm_is(model, "head", "Qwen3-MoE")
        or (None if softmax_top_k(model) else "Qwen3-MoE routes by softmax and top-k")
    )


def rules(model: DecoderLM) -> list[Rule]:
    table = frame_rules(model)
    for index, block in enumerate(model.blocks):
        ours, theirs = layer_names(index)
        table += attention_rules(index, block)
        if block.moe is None:
            table += feed_forward_rules(f"{ours}.ffn", f"{theirs}.mlp")
        else:
            table.append(same(f"{ours}.moe.router.scorer.weight", f"{theirs}.mlp.gate.weight"))
            experts = block.moe.experts.num_experts
            table += expert_rules(f"{ours}.moe.experts", f"{theirs}.mlp.experts", experts, PROJECTIONS)
    return table


def config(model: DecoderLM) -> dict[str, Any]:
    routing = softmax_top_k(model)
    assert routing is not None
    return common_config(model) | {
        "head_dim": model.config["head_dim"],
        "moe_intermediate_size": model.config["expert_hidden"],
        "num_experts": model.config["num_experts"],
        "num_experts_per_tok": routing.top_k,
        "norm_topk_prob": routing.normalised,
        "mlp_only_layers": dense_layers(model),
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
    }


QWEN3_MOE = Layout("Qwen3-MoE", "qwen3_moe", "Qwen3MoeForCausalLM", misfit, rules, config)
