"""The layout of DeepSeek-V3: latent attention, dense layers first, biased selection, shared experts."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import common_config
from moestro.models.layouts.fits import latent, stock_feed_forward
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.routing import biased_sigmoid_top_k
from moestro.models.layouts.shared import (
    biased_sigmoid_misfit,
    dense_layers_first,
    latent_config,
    mixture_config,
    shared_rules,
)

BIASED_SIGMOID = {"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def misfit(model: DecoderLM) -> str | None:
    return (
        stock_feed_forward(model)
        or latent(model)
        or dense_layers_first(model)
        or biased_sigmoid_misfit(model, biased_sigmoid_top_k(model), "DeepSeek-V3")
    )


def config(model: DecoderLM) -> dict[str, Any]:
    own = {"rope_interleave": True, "num_nextn_predict_layers": 0}
    mixture = mixture_config(model, biased_sigmoid_top_k(model))
    return common_config(model) | latent_config(model.config) | own | mixture | BIASED_SIGMOID


DEEPSEEK_V3 = Layout("DeepSeek-V3", "deepseek_v3", "DeepseekV3ForCausalLM", misfit, shared_rules, config)
