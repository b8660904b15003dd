"""The layout of Qwen3-MoE: per-head query and key norms, dense layers anywhere."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, mixture_rules
from moestro.models.layouts.fits import dense_layers, grouped_query, qk_norm_is, stock_feed_forward
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import softmax_top_k


def misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or qk_norm_is(model, "head", "Qwen3-MoE")
        or (None if softmax_top_k(model) else "Qwen3-MoE routes by softmax and top-k")
    )


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


QWEN3_MOE = Layout("Qwen3-MoE", "qwen3_moe", "Qwen3MoeForCausalLM", misfit, mixture_rules, config)
