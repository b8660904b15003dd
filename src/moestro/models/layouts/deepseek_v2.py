"""The layout of DeepSeek-V2: latent attention, dense layers first, scaled softmax weights, shared experts."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config
from moestro.models.layouts.fits import latent, stock_feed_forward
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import grouped_softmax_top_k
from moestro.models.layouts.shared import (
    dense_layers_first,
    latent_config,
    mixture_config,
    plain_shared_experts,
    shared_rules,
)


def misfit(model: DecoderLM) -> str | None:
    return stock_feed_forward(model) or latent(model) or dense_layers_first(model) or _routing(model)


def _routing(model: DecoderLM) -> str | None:
    if grouped_softmax_top_k(model) is None:
        return "DeepSeek-V2 routes by softmax and top-k in groups, weights scaled and not normalised"
    return plain_shared_experts(model)


def config(model: DecoderLM) -> dict[str, Any]:
    routing = grouped_softmax_top_k(model)
    assert routing is not None
    limited = routing.groups_kept < routing.num_groups
    return (
        common_config(model)
        | latent_config(model.config)
        | mixture_config(model, routing)
        | {"norm_topk_prob": False, "topk_method": "group_limited_greedy" if limited else "greedy"}
    )


DEEPSEEK_V2 = Layout("DeepSeek-V2", "deepseek_v2", "DeepseekV2ForCausalLM", misfit, shared_rules, config)
