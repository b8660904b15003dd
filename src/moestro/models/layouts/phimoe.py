"""The layout of Phi-3.5-MoE: layer norms, SparseMixer routing, biases in attention and head."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, mixture_rules
from moestro.models.layouts.fits import (
    all_mixtures,
    grouped_query,
    heads_fill_width,
    no_shared,
    qk_norm_is,
    stock_feed_forward,
    word_is,
)
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.mixtral import EXPERT_NAMES
from moestro.models.layouts.routing import sparse_mixing
from moestro.models.layouts.rules import Rule


def misfit(model: DecoderLM) -> str | None:
    routing = sparse_mixing(model)
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or qk_norm_is(model, "none", "Phi-3.5-MoE")
        or word_is(model, "norm", ("layer",), "Phi-3.5-MoE")
        or word_is(model, "attention_bias", ("none", "all"), "Phi-3.5-MoE")
        or heads_fill_width(model)
        or all_mixtures(model, "Phi-3.5-MoE")
        or no_shared(model, "Phi-3.5-MoE")
        or (None if routing and routing.top_k == 2 else "Phi-3.5-MoE routes by SparseMixer to two experts")
    )


def rules(model: DecoderLM) -> list[Rule]:
    return mixture_rules(model, "block_sparse_moe", EXPERT_NAMES)


def config(model: DecoderLM) -> dict[str, Any]:
    routing, ours = sparse_mixing(model), model.config
    assert routing is not None
    return common_config(model) | {
        "intermediate_size": ours["expert_hidden"],
        "attention_bias": ours["attention_bias"] == "all",
        "lm_head_bias": ours["head_bias"],
        "num_local_experts": ours["num_experts"],
        "num_experts_per_tok": routing.top_k,
        "router_jitter_noise": routing.epsilon,
        "input_jitter_noise": 0.0,
        "sliding_window": None,
    }


PHIMOE = Layout(
    "Phi-3.5-MoE",
    "phimoe",
    "PhimoeForCausalLM",
    misfit,
    rules,
    config,
    says=frozenset({"norm", "attention_bias", "head_bias"}),
)
