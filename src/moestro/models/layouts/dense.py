"""The layouts of dense models: Llama, and Qwen3 where queries and keys are normalised."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config, mixture_rules
from moestro.models.layouts.fits import grouped_query, qk_norm_is, stock_feed_forward
from moestro.models.layouts.layout import Layout


def llama_misfit(model: DecoderLM) -> str | None:
    return stock_feed_forward(model) or grouped_query(model) or qk_norm_is(model, "none", "Llama")


def qwen3_misfit(model: DecoderLM) -> str | None:
    return stock_feed_forward(model) or grouped_query(model) or qk_norm_is(model, "head", "Qwen3")


def config(model: DecoderLM) -> dict[str, Any]:
    return common_config(model) | {"head_dim": model.config["head_dim"], "attention_bias": False}


LLAMA = Layout("Llama", "llama", "LlamaForCausalLM", llama_misfit, mixture_rules, config)
QWEN3 = Layout("Qwen3", "qwen3", "Qwen3ForCausalLM", qwen3_misfit, mixture_rules, config)
