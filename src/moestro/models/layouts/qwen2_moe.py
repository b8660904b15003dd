"""The layout of Qwen1.5-MoE and Qwen2-MoE: biases of queries, keys and values, a shared expert under a gate."""

from __future__ import annotations

from typing import Any

from moestro.experts import GatedFeedForward
from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, feed_forward_rules, layer_names, mixture_rules
from moestro.models.layouts.fits import (
    dense_layers,
    grouped_query,
    heads_fill_width,
    qk_norm_is,
    stock_feed_forward,
    word_is,
)
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import softmax_top_k
from moestro.models.layouts.rules import Rule, transposed


def misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or qk_norm_is(model, "none", "Qwen2-MoE")
        or word_is(model, "attention_bias", ("none", "qkv"), "Qwen2-MoE")
        or heads_fill_width(model)
        or (None if softmax_top_k(model) else "Qwen2-MoE routes by softmax and top-k")
        or _gated_shared(model)
    )


def _gated_shared(model: DecoderLM) -> str | None:
    gated = all(isinstance(block.moe.shared, GatedFeedForward) for block in model.blocks if block.moe is not None)
    return None if gated else "it has a shared expert under a gate"


def rules(model: DecoderLM) -> list[Rule]:
    table = mixture_rules(model)
    for index, block in enumerate(model.blocks):
        if block.moe is not None:
            ours, theirs = layer_names(index)
            table += feed_forward_rules(f"{ours}.moe.shared.inner", f"{theirs}.mlp.shared_expert")
            table.append(transposed(f"{ours}.moe.shared.weight", f"{theirs}.mlp.shared_expert_gate.weight"))
    return table


def config(model: DecoderLM) -> dict[str, Any]:
    routing = softmax_top_k(model)
    assert routing is not None
    shared = next(block.moe.shared for block in model.blocks if block.moe is not None)
    assert isinstance(shared, GatedFeedForward)
    return common_config(model) | {
        "qkv_bias": model.config["attention_bias"] == "qkv",
        "moe_intermediate_size": model.config["expert_hidden"],
        "shared_expert_intermediate_size": shared.inner.hidden,
        "num_experts": model.config["num_experts"],
        "num_experts_per_tok": routing.top_k,
        "norm_topk_prob": routing.normalised,
        "mlp_only_layers": dense_layers(model),
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
    }


QWEN2_MOE = Layout(
    "Qwen2-MoE", "qwen2_moe", "Qwen2MoeForCausalLM", misfit, rules, config, says=frozenset({"attention_bias"})
)
