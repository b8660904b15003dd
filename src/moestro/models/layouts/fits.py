"""Questions that layouts ask of a model; each answers with the reason for a no, or None."""

from __future__ import annotations

from typing import Any

from moestro.experts import GLU
from moestro.models.decoder import DecoderLM
from moestro.models.layouts.common import HIDDEN_ACT


def stock_feed_forward(model: DecoderLM) -> str | None:
    """Stock architectures have gated feed-forward networks only, and banks of them as experts."""
    activation = model.config["activation"]
    if activation not in HIDDEN_ACT:
        return f"stock architectures have gated feed-forward networks, not {activation}"
    return plain_banks(model)


def plain_banks(model: DecoderLM) -> str | None:
    kinds = {type(block.moe.experts).__name__ for block in model.blocks if block.moe is not None}
    return (
        None if kinds <= {GLU.__name__} else f"stock architectures have no experts like {', '.join(sorted(kinds))}"
    )


def grouped_query(model: DecoderLM) -> str | None:
    kind = model.config["attention"]
    return None if kind == "grouped-query" else f"its attention is grouped-query, not {kind}"


def latent(model: DecoderLM) -> str | None:
    kind = model.config["attention"]
    return None if kind == "latent" else f"its attention is latent, not {kind}"


def qk_norm_is(model: DecoderLM, kind: str, layout: str) -> str | None:
    actual = model.config["qk_norm"]
    return None if actual == kind else f"{layout} has qk_norm={kind!r}, not {actual!r}"


def heads_fill_width(model: DecoderLM) -> str | None:
    config = model.config
    if config["num_heads"] * config["head_dim"] == config["width"]:
        return None
    return f"its heads fill the width {config['width']}, not {config['num_heads']} x {config['head_dim']}"


def word_is(model: DecoderLM, argument: str, words: tuple[Any, ...], layout: str) -> str | None:
    """Whether an argument of the model has a value that the layout can say."""
    actual = model.config[argument]
    return None if actual in words else f"{layout} has {argument} {' or '.join(map(repr, words))}, not {actual!r}"


def no_shared(model: DecoderLM, layout: str) -> str | None:
    shared = any(block.moe.shared is not None for block in model.blocks if block.moe is not None)
    return f"{layout} has no shared experts" if shared else None


def all_mixtures(model: DecoderLM, layout: str) -> str | None:
    dense = dense_layers(model)
    return f"{layout} has no dense layers but layers {dense} are" if dense else None


def dense_layers(model: DecoderLM) -> list[int]:
    return [index for index, block in enumerate(model.blocks) if block.moe is None]
