"""Decoding on a CPU: one token of one sequence at a time, in as few operators as it takes.

Between the matrix products of a single row the time goes into calling operators, not into what they compute. Here
each layer is a short program over prepared tensors instead of nested modules:

    residual stream, norms, attention, routing   float32
    matrix products                              in the dtype of their weights, bfloat16 for codes

The numbers are those of the model's own forward pass up to rounding, of which there is less.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.inference.choose_steps import choose_steps
from moestro.inference.moment import Moment
from moestro.inference.single_row import Norm
from moestro.inference.steps import STEPS, CompiledSteps, Step
from moestro.kernels.compiled import why_not
from moestro.models import DecoderLM, KeyValueCache
from moestro.models.norm import RMSNorm


class Decoder:
    """Continues one sequence whose beginning is in a cache.

    Args:
        model: one that `suits_decoder`.
        cache: of one sequence, as the model filled it; what it stores is taken over.
        domain: source or language of the text, for methods that route by it.
        steps: "torch", "compiled", or "auto" for the latter where it can be had.

    Raises:
        ValueError: compiled steps where there are none, with the reason.

    Shapes: a token id -> logits of the next `[vocab_size]`.
    """

    def __init__(
        self, model: DecoderLM, cache: KeyValueCache, domain: int | None = None, steps: str = "torch"
    ) -> None:
        self.model, self.domain, self.length = model, domain, cache.length
        maker = STEPS[choose_steps(steps)](model)
        self.norm, self.head = Norm(model.norm), maker.map(model.head)
        self.steps: list[Step] = []
        for block, memory in zip(model.blocks, cache.layers, strict=True):
            self.steps += [maker.attention(block, memory), maker.feed_forward(block)]

    @torch.inference_mode()
    def __call__(self, token: int) -> Tensor:
        moment = Moment.of(self.model, token, self.length, self.domain)
        x = self.model.embedding.weight[token : token + 1].float()
        for step in self.steps:
            x = step(x, moment)
        self.length += 1
        return self.head(self.norm(x))[0].clone()


def plan_decoding(model: DecoderLM, steps: str = "auto") -> str:
    """How `generate` will find one token after another, in words.

    Args:
        model: the language model.
        steps: as `generate` takes them.

    Raises:
        ValueError: compiled steps where there are none, with the reason.
    """
    kind = choose_steps(steps)
    if not model.cacheable:
        return "the whole text again for every token, since a router looks at earlier ones"
    if not suits_decoder(model):
        return "the model's own forward pass"
    if kind == "torch":
        reason = why_not() if steps == "auto" else None
        return "torch's operators" + (f" ({reason})" if reason else "")
    makers, blocks = CompiledSteps(model), list(model.blocks)
    compiled = sum(makers.compiles_attention(block) + makers.compiles_feed_forward(block) for block in blocks)
    rest = "" if compiled == 2 * len(blocks) else ", torch's operators for the others"
    return f"compiled steps for {compiled} of {2 * len(blocks)} half layers{rest}"


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
