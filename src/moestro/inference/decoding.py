"""Decoding on a CPU: one token of one sequence at a time, in as few operators as it takes.

Between the matrix products of a single row the time goes into calling operators, not into what they compute. Here
each layer is a short program over prepared tensors instead of nested modules:

    residual stream, norms, attention, routing   float32
    matrix products                              in the dtype of their weights, bfloat16 for codes

The numbers are those of the model's own forward pass up to rounding, of which there is less.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moestro.inference.attention_step import CachedAttention, ModuleAttention
from moestro.inference.feed_forward_step import MixtureStep, ModuleStep, routes_plainly
from moestro.inference.moment import Moment
from moestro.inference.single_row import Norm, as_map
from moestro.models import DecoderLM, GroupedQueryAttention, KeyValueCache
from moestro.models.norm import RMSNorm

Step = Callable[[Tensor, Moment], Tensor]


class Decoder:
    """Continues one sequence whose beginning is in a cache.

    Args:
        model: one that `suits_decoder`.
        cache: of one sequence, as the model filled it; what it stores is taken over.
        domain: source or language of the text, for methods that route by it.

    Shapes: a token id -> logits of the next `[vocab_size]`.
    """

    def __init__(self, model: DecoderLM, cache: KeyValueCache, domain: int | None = None) -> None:
        self.model, self.domain, self.length = model, domain, cache.length
        dtype = model.embedding.weight.dtype
        self.norm, self.head = Norm(model.norm), as_map(model.head, dtype)
        mixtures = [block.moe for block in model.blocks if block.moe is not None]
        # all or none: a router that reads the decision of the layer before needs that there is one
        mixture = MixtureStep if all(map(routes_plainly, mixtures)) else ModuleStep
        self.steps: list[Step] = []
        for block, memory in zip(model.blocks, cache.layers, strict=True):
            short = type(block.attention) is GroupedQueryAttention and block.attention.plain
            self.steps.append((CachedAttention if short else ModuleAttention)(block, memory, dtype))
            self.steps.append((ModuleStep if block.moe is None else mixture)(block, dtype))

    @torch.inference_mode()
    def __call__(self, token: int) -> Tensor:
        moment = Moment.of(self.model, token, self.length, self.domain)
        x = self.model.embedding.weight[token : token + 1].float()
        for step in self.steps:
            x = step(x, moment)
        self.length += 1
        return self.head(self.norm(x))[0]


def suits_decoder(model: DecoderLM) -> bool:
    """Whether a `Decoder` computes what the model would: on a CPU, in float32 or bfloat16, and nobody watches.

    Whoever put a hook on a module wants to see it run.
    """
    weight = model.embedding.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and all(type(norm) is RMSNorm for norm in _norms(model))
        and all(type(each) is nn.Identity for each in _scales(model))
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    )


def _scales(model: DecoderLM) -> list[nn.Module]:
    """What a model may do to its residual stream, and a `Decoder` does not."""
    behind = [each for block in model.blocks for each in (block.attention_after, block.ffn_after)]
    return [model.embedding_scale, model.logit_scale, *behind]


def _norms(model: DecoderLM) -> list[nn.Module]:
    return [model.norm, *(norm for block in model.blocks for norm in (block.attention_norm, block.ffn_norm))]
