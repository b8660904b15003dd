"""The layout of gpt-oss: windows and sinks in attention, biases everywhere, clamped experts."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import (
    common_config,
    layer_names,
    mixture_rules,
)
from moestro.models.layouts.fits import (
    all_mixtures,
    grouped_query,
    no_shared,
    plain_banks,
    qk_norm_is,
    word_is,
)
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import biased_logits_top_k
from moestro.models.layouts.rules import Rule, interleaved, same


def misfit(model: DecoderLM) -> str | None:
    return (
        word_is(model, "activation", ("clamped_swiglu",), "gpt-oss")
        or plain_banks(model)
        or grouped_query(model)
        or qk_norm_is(model, "none", "gpt-oss")
        or word_is(model, "attention_bias", ("none", "all"), "gpt-oss")
        or word_is(model, "expert_bias", (True,), "gpt-oss")
        or word_is(model, "sinks", (True,), "gpt-oss")
        or _one_window(model)
        or all_mixtures(model, "gpt-oss")
        or no_shared(model, "gpt-oss")
        or (None if biased_logits_top_k(model) else "gpt-oss routes by logits with a bias, softmax over the chosen")
    )


def _one_window(model: DecoderLM) -> str | None:
    sizes = {window for window in model.config["windows"] or [] if window is not None}
    return None if len(sizes) < 2 else f"gpt-oss has windows of one size, not of {sorted(sizes)}"


def rules(model: DecoderLM) -> list[Rule]:
    table = mixture_rules(model, router="router", experts=_expert_rules)
    scorer = "router.scorer.weight"
    table = [
        same(rule.ours[0].replace(scorer, "router.scorer.scorer.weight"), rule.theirs[0])
        if rule.ours[0].endswith(scorer)
        else rule
        for rule in table
    ]
    for index in range(len(model.blocks)):
        ours, theirs = layer_names(index)
        table.append(same(f"{ours}.moe.router.scorer.bias", f"{theirs}.mlp.router.bias"))
    return table


def _expert_rules(ours: str, theirs: str, num_experts: int, names: dict[str, str]) -> list[Rule]:
    pairs = (("", ""), ("_bias", "_bias"))
    return [
        *(interleaved((f"{ours}.gate{a}", f"{ours}.up{a}"), f"{theirs}.gate_up_proj{b}") for a, b in pairs),
        *(same(f"{ours}.down{a}", f"{theirs}.down_proj{b}") for a, b in pairs),
    ]


def config(model: DecoderLM) -> dict[str, Any]:
    routing, ours = biased_logits_top_k(model), model.config
    assert routing is not None
    windows = ours["windows"] or [None] * ours["num_layers"]
    return common_config(model) | {
        "intermediate_size": ours["expert_hidden"],
        "head_dim": ours["head_dim"],
        "attention_bias": ours["attention_bias"] == "all",
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "num_local_experts": ours["num_experts"],
        "num_experts_per_tok": routing.top_k,
    }


GPT_OSS = Layout(
    "gpt-oss",
    "gpt_oss",
    "GptOssForCausalLM",
    misfit,
    rules,
    config,
    says=frozenset({"attention_bias", "expert_bias", "sinks", "windows"}),
)
