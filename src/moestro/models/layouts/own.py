"""Our own layout, for models that no stock architecture computes: tensors under our names and shapes."""

from __future__ import annotations

from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.rules import Rule, same


def rules(model: DecoderLM) -> list[Rule]:
    tied = model.config["tied_embeddings"]
    return [same(name, name) for name in model.state_dict() if not (tied and name == "head.weight")]


def config(model: DecoderLM) -> dict[str, Any]:
    return {"vocab_size": model.config["vocab_size"], "tie_word_embeddings": model.config["tied_embeddings"]}


OWN = Layout("moestro", "moestro", None, lambda model: None, rules, config)
