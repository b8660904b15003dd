"""The layout of dots.llm1: per-head query and key norms, and the experts and routers of DeepSeek-V3."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config
from moestro.models.layouts.deepseek_v3 import BIASED_SIGMOID
from moestro.models.layouts.fits import grouped_query, qk_norm_is, stock_feed_forward
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import biased_sigmoid_top_k
from moestro.models.layouts.shared import biased_sigmoid_misfit, dense_layers_first, mixture_config, shared_rules


def misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or grouped_query(model)
        or qk_norm_is(model, "head", "dots.llm1")
        or dense_layers_first(model)
        or biased_sigmoid_misfit(model, biased_sigmoid_top_k(model), "dots.llm1")
    )


def config(model: DecoderLM) -> dict[str, Any]:
    own = {"head_dim": model.config["head_dim"], "attention_bias": False, "sliding_window": None}
    return common_config(model) | own | mixture_config(model, biased_sigmoid_top_k(model)) | BIASED_SIGMOID


DOTS1 = Layout("dots.llm1", "dots1", "Dots1ForCausalLM", misfit, shared_rules, config)
