"""The dense twin: the model to compare a mixture of experts with."""

from __future__ import annotations

from moestro.models.arguments import feed_forward_size
from moestro.models.build import build_language_model
from moestro.models.decoder import DecoderLM


def build_dense_twin(model: DecoderLM, seed: int | None = None) -> DecoderLM:
    """The same model with every feed-forward layer dense, and as many parameters as one token uses in `model`.

    Only the hidden size of the feed-forward layers differs. It is rounded to a whole number, which leaves the
    counts within half a hidden unit per layer of each other (well below 1 % at any real size).
    """
    hidden = dense_twin_hidden(model)
    config = model.config | {
        "method": None,
        "options": {},
        "dense_hidden": hidden,
        "first_dense": 0,
        "every": 1,
    }
    return build_language_model(**config, seed=seed)


def dense_twin_hidden(model: DecoderLM) -> int:
    """Hidden size of the dense layers with which a model has the active parameters of `model`."""
    counts = model.parameter_counts()
    feed_forward = sum(counts.active_components.get(name, 0) for name in ("router", "experts", "shared", "dense"))
    per_unit = feed_forward_size(model.config["width"], 1, model.config["activation"])
    return max(1, round(feed_forward / (per_unit * len(model.layers))))
