"""The layout of ERNIE 4.5: neighbouring features rotated, a bias on softmax scores, shared experts."""

from __future__ import annotations

from typing import Any

from moestro.experts import FeedForward
from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, feed_forward_rules, layer_names, mixture_rules
from moestro.models.layouts.fits import grouped_query, heads_fill_width, qk_norm_is, stock_feed_forward, word_is
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import biased_softmax_top_k
from moestro.models.layouts.rules import Rule
from moestro.models.layouts.shared import shared_or_none


def misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or qk_norm_is(model, "none", "ERNIE 4.5")
        or word_is(model, "rope_order", ("pairs",), "ERNIE 4.5")
        or heads_fill_width(model)
        or (None if biased_softmax_top_k(model) else "ERNIE 4.5 routes by biased softmax scores and top-k")
        or shared_or_none(model)
    )


def rules(model: DecoderLM) -> list[Rule]:
    table = mixture_rules(model)
    for index, block in enumerate(model.blocks):
        if block.moe is None:
            continue
        ours, theirs = layer_names(index)
        table.append(_as_row(f"{ours}.moe.router.select.bias", f"{theirs}.mlp.moe_statics.e_score_correction_bias"))
        if block.moe.shared is not None:
            table += feed_forward_rules(f"{ours}.moe.shared", f"{theirs}.mlp.shared_experts")
    return table


def _as_row(ours: str, theirs: str) -> Rule:
    return Rule((ours,), (theirs,), lambda x: [x[0].unsqueeze(0)], lambda x: [x[0].squeeze(0)])


def config(model: DecoderLM) -> dict[str, Any]:
    routing, ours = biased_softmax_top_k(model), model.config
    assert routing is not None
    shared = next(block.moe.shared for block in model.blocks if block.moe is not None)
    hidden = shared.hidden if isinstance(shared, FeedForward) else 0
    return common_config(model) | {
        "use_bias": False,
        "moe_intermediate_size": ours["expert_hidden"],
        "moe_num_experts": ours["num_experts"],
        "moe_k": routing.top_k,
        "moe_num_shared_experts": hidden // ours["expert_hidden"],
        "moe_layer_start_index": ours["first_dense"],
        "moe_layer_end_index": ours["num_layers"] - 1,
        "moe_layer_interval": ours["every"],
        "moe_norm_min": 1e-12,
    }


ERNIE4_5_MOE = Layout(
    "ERNIE 4.5",
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    misfit,
    rules,
    config,
    says=frozenset({"rope_order"}),
)
