"""Our own layout, for models that no stock architecture computes: tensors under our names and shapes."""

from __future__ import annotations

from typing import Any

from moestro.experts import QuantisedStack
from moestro.models.decoder import DecoderLM
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.rules import Rule, same


def rules(model: DecoderLM) -> list[Rule]:
    tied = {"head.weight"} if model.config["tied_embeddings"] else set()
    packed = {
        f"{name}.code": module
        for name, module in model.named_modules()
        if isinstance(module, QuantisedStack) and module.bits == 4
    }
    return [
        _in_plain_order(name, packed[name]) if name in packed else same(name, name)
        for name in model.state_dict()
        if name not in tied
    ]


def _in_plain_order(name: str, stack: QuantisedStack) -> Rule:
    """4-bit codes: packed for this processor here, in an order that every processor knows there."""
    return Rule((name,), (name,), lambda codes: [stack.plain_codes()], lambda codes: [stack.packed_codes(codes[0])])


def config(model: DecoderLM) -> dict[str, Any]:
    return {"vocab_size": model.config["vocab_size"], "tie_word_embeddings": model.config["tied_embeddings"]}


OWN = Layout("moestro", "moestro", None, lambda model: None, rules, config, says=None)
