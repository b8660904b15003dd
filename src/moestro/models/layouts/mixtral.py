"""The layout of Mixtral: every layer a mixture, weights renormalised over the chosen experts."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, mixture_rules
from moestro.models.layouts.fits import all_mixtures, grouped_query, qk_norm_is, stock_feed_forward
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import SoftmaxTopK, softmax_top_k
from moestro.models.layouts.rules import Rule

EXPERT_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or qk_norm_is(model, "none", "Mixtral")
        or all_mixtures(model, "Mixtral")
        or (None if _routing(model) else "Mixtral routes by softmax and top-k, weights normalised to one")
    )


def _routing(model: DecoderLM) -> SoftmaxTopK | None:
    routing = softmax_top_k(model)
    return routing if routing is not None and routing.normalised else None


def rules(model: DecoderLM) -> list[Rule]:
    return mixture_rules(model, "block_sparse_moe", EXPERT_NAMES)


def config(model: DecoderLM) -> dict[str, Any]:
    routing = _routing(model)
    assert routing is not None
    return common_config(model) | {
        "intermediate_size": model.config["expert_hidden"],
        "head_dim": model.config["head_dim"],
        "num_local_experts": model.config["num_experts"],
        "num_experts_per_tok": routing.top_k,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    }


MIXTRAL = Layout("Mixtral", "mixtral", "MixtralForCausalLM", misfit, rules, config)
