"""The layout of MiniMax-M2: norms over all heads, a part of each rotated, DeepSeek-V3's routing."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, layer_names, mixture_rules, partial_rope
from moestro.models.layouts.fits import all_mixtures, grouped_query, no_shared, qk_norm_is, stock_feed_forward
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.mixtral import EXPERT_NAMES
from moestro.models.layouts.routing import BiasedSigmoidTopK, biased_sigmoid_top_k
from moestro.models.layouts.rules import Rule, same


def misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or qk_norm_is(model, "full", "MiniMax-M2")
        or all_mixtures(model, "MiniMax-M2")
        or no_shared(model, "MiniMax-M2")
        or (None if _routing(model) else "MiniMax-M2 routes by biased sigmoid scores and top-k, without groups")
    )


def _routing(model: DecoderLM) -> BiasedSigmoidTopK | None:
    routing = biased_sigmoid_top_k(model)
    if routing is None or routing.groups_kept < routing.num_groups or routing.scale != 1:
        return None
    return routing


def rules(model: DecoderLM) -> list[Rule]:
    table = mixture_rules(model, "block_sparse_moe", EXPERT_NAMES)
    for index in range(len(model.blocks)):
        ours, theirs = layer_names(index)
        bias = f"{theirs}.block_sparse_moe.e_score_correction_bias"
        table.append(same(f"{ours}.moe.router.select.bias", bias))
    return table


def config(model: DecoderLM) -> dict[str, Any]:
    routing = _routing(model)
    assert routing is not None
    return common_config(model) | {
        "intermediate_size": model.config["expert_hidden"],
        "head_dim": model.config["head_dim"],
        "num_local_experts": model.config["num_experts"],
        "num_experts_per_tok": routing.top_k,
        "router_jitter_noise": 0.0,
        **partial_rope(model),
    }


MINIMAX_M2 = Layout("MiniMax-M2", "minimax_m2", "MiniMaxM2ForCausalLM", misfit, rules, config, partial=True)
