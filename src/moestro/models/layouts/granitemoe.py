"""The layouts of Granite 3: constants on embeddings, scores, residuals and logits; perhaps a shared expert."""

from __future__ import annotations

from typing import Any

from moestro.experts import FeedForward
from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, layer_names, mixture_rules
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
from moestro.models.layouts.routing import SoftmaxTopK, softmax_top_k
from moestro.models.layouts.rules import Rule, joined
from moestro.models.layouts.shared import plain_shared_experts

SAYS = frozenset({"attention_bias", "attention_scale", "embedding_scale", "residual_scale", "logit_divisor"})


def misfit(model: DecoderLM) -> str | None:
    return _common_misfit(model) or no_shared(model, "Granite-MoE")


def shared_misfit(model: DecoderLM) -> str | None:
    return _common_misfit(model) or plain_shared_experts(model)


def _common_misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or qk_norm_is(model, "none", "Granite-MoE")
        or word_is(model, "attention_bias", ("none", "all"), "Granite-MoE")
        or heads_fill_width(model)
        or all_mixtures(model, "Granite-MoE")
        or (None if _routing(model) else "Granite-MoE routes by softmax and top-k, weights normalised to one")
    )


def _routing(model: DecoderLM) -> SoftmaxTopK | None:
    routing = softmax_top_k(model)
    return routing if routing is not None and routing.normalised else None


def rules(model: DecoderLM) -> list[Rule]:
    return mixture_rules(model, "block_sparse_moe", router="router.layer", experts=_expert_rules)


def shared_rules(model: DecoderLM) -> list[Rule]:
    table = rules(model)
    for index in range(len(model.blocks)):
        ours, theirs = layer_names(index)
        table += _joined_rules(f"{ours}.moe.shared", f"{theirs}.shared_mlp", axis=0)
    return table


def _expert_rules(ours: str, theirs: str, num_experts: int, names: dict[str, str]) -> list[Rule]:
    return _joined_rules(ours, theirs.removesuffix(".experts"), axis=1)


def _joined_rules(ours: str, theirs: str, axis: int) -> list[Rule]:
    inputs = joined((f"{ours}.gate", f"{ours}.up"), f"{theirs}.input_linear.weight", axis, transpose=True)
    return [inputs, joined((f"{ours}.down",), f"{theirs}.output_linear.weight", axis, transpose=True)]


def config(model: DecoderLM) -> dict[str, Any]:
    routing, ours = _routing(model), model.config
    assert routing is not None
    return common_config(model) | {
        "intermediate_size": ours["expert_hidden"],
        "attention_bias": ours["attention_bias"] == "all",
        "attention_multiplier": ours["attention_scale"] or ours["head_dim"] ** -0.5,
        "embedding_multiplier": ours["embedding_scale"],
        "residual_multiplier": ours["residual_scale"],
        "logits_scaling": ours["logit_divisor"],
        "num_local_experts": ours["num_experts"],
        "num_experts_per_tok": routing.top_k,
    }


def shared_config(model: DecoderLM) -> dict[str, Any]:
    shared = next(block.moe.shared for block in model.blocks if block.moe is not None)
    assert isinstance(shared, FeedForward)
    return config(model) | {"shared_intermediate_size": shared.hidden}


GRANITEMOE = Layout("Granite-MoE", "granitemoe", "GraniteMoeForCausalLM", misfit, rules, config, says=SAYS)
GRANITEMOESHARED = Layout(
    "Granite-MoE with a shared expert",
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    shared_misfit,
    shared_rules,
    shared_config,
    says=SAYS,
)
