"""The layout of Hunyuan's mixtures: queries and keys normalised after rotation, one shared expert."""

from __future__ import annotations

from typing import Any

from moestro.experts import FeedForward
from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, feed_forward_rules, layer_names, mixture_rules
from moestro.models.layouts.fits import all_mixtures, grouped_query, qk_norm_is, stock_feed_forward, word_is
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import SoftmaxTopK, softmax_top_k
from moestro.models.layouts.rules import Rule


def misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or qk_norm_is(model, "rotated", "Hunyuan-MoE")
        or word_is(model, "attention_bias", ("none", "all"), "Hunyuan-MoE")
        or all_mixtures(model, "Hunyuan-MoE")
        or (None if _routing(model) else "Hunyuan-MoE routes by softmax and top-k, weights normalised to one")
        or _one_shared(model)
    )


def _routing(model: DecoderLM) -> SoftmaxTopK | None:
    routing = softmax_top_k(model)
    return routing if routing is not None and routing.normalised else None


def _one_shared(model: DecoderLM) -> str | None:
    shared = [block.moe.shared for block in model.blocks if block.moe is not None]
    hidden = model.config["expert_hidden"]
    fits = all(isinstance(each, FeedForward) and each.hidden == hidden for each in shared)
    return None if fits else "Hunyuan-MoE has one shared expert, as large as a routed one"


def rules(model: DecoderLM) -> list[Rule]:
    table = mixture_rules(model, router="gate.wg")
    for index in range(len(model.blocks)):
        ours, theirs = layer_names(index)
        table += feed_forward_rules(f"{ours}.moe.shared", f"{theirs}.mlp.shared_mlp")
    return table


def config(model: DecoderLM) -> dict[str, Any]:
    routing = _routing(model)
    assert routing is not None
    return common_config(model) | {
        "intermediate_size": model.config["expert_hidden"],
        "head_dim": model.config["head_dim"],
        "attention_bias": model.config["attention_bias"] == "all",
        "num_experts": model.config["num_experts"],
        "moe_topk": routing.top_k,
    }


HUNYUAN_V1_MOE = Layout(
    "Hunyuan-MoE",
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    misfit,
    rules,
    config,
    says=frozenset({"attention_bias"}),
)
