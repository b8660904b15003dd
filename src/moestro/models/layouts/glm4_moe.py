"""The layout of GLM-4.5: a part of each head rotated, and the experts and routers of DeepSeek-V3."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, partial_rope
from moestro.models.layouts.deepseek_v3 import BIASED_SIGMOID
from moestro.models.layouts.fits import grouped_query, stock_feed_forward, word_is
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import biased_sigmoid_top_k
from moestro.models.layouts.shared import biased_sigmoid_misfit, dense_layers_first, mixture_config, shared_rules


def misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or word_is(model, "qk_norm", ("none", "head"), "GLM-4.5")
        or word_is(model, "attention_bias", ("none", "qkv"), "GLM-4.5")
        or dense_layers_first(model)
        or biased_sigmoid_misfit(model, biased_sigmoid_top_k(model), "GLM-4.5")
    )


def config(model: DecoderLM) -> dict[str, Any]:
    own = {
        "head_dim": model.config["head_dim"],
        "attention_bias": model.config["attention_bias"] == "qkv",
        "use_qk_norm": model.config["qk_norm"] == "head",
        "num_nextn_predict_layers": 0,
        **partial_rope(model),
    }
    return common_config(model) | own | mixture_config(model, biased_sigmoid_top_k(model)) | BIASED_SIGMOID


GLM4_MOE = Layout(
    "GLM-4.5",
    "glm4_moe",
    "Glm4MoeForCausalLM",
    misfit,
    shared_rules,
    config,
    says=frozenset({"attention_bias"}),
    partial=True,
)
