"""The layout of OLMoE: query and key norms over all heads at once, every layer a mixture."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, mixture_rules
from moestro.models.layouts.fits import (
    all_mixtures,
    grouped_query,
    heads_fill_width,
    qk_norm_is,
    stock_feed_forward,
)
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import softmax_top_k


def misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or qk_norm_is(model, "full", "OLMoE")
        or heads_fill_width(model)
        or all_mixtures(model, "OLMoE")
        or (None if softmax_top_k(model) else "OLMoE routes by softmax and top-k")
    )


def config(model: DecoderLM) -> dict[str, Any]:
    routing = softmax_top_k(model)
    assert routing is not None
    return common_config(model) | {
        "intermediate_size": model.config["expert_hidden"],
        "num_experts": model.config["num_experts"],
        "num_experts_per_tok": routing.top_k,
        "norm_topk_prob": routing.normalised,
        "clip_qkv": None,
    }


OLMOE = Layout("OLMoE", "olmoe", "OlmoeForCausalLM", misfit, mixture_rules, config)
