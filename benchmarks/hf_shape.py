"""The OLMoE-shaped transformers model and the random tokens that benchmarks of `moestro.hf` run."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB, LENGTH = 1024, 512
SHAPE: dict[str, Any] = {
    "tokens": 2048,
    "experts": 64,
    "top_k": 8,
    "width": 2048,
    "hidden": 1024,
    "dtype": "bfloat16",
}
"""Options of a benchmark that builds this model, with their defaults."""


def olmoe_shaped(arguments: Namespace) -> tuple[Any, Tensor]:
    """The model and token ids `[sequences, 512]`, of the sizes that the arguments name."""
    config = transformers.OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=arguments.width,
        intermediate_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=16,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))
    return model, torch.randint(2, VOCAB, (arguments.tokens // LENGTH, LENGTH))
