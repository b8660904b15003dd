"""What a layout is: a way to write one kind of model to disk so that others can read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.rules import Rule

#: arguments of a model, and the values that they have in every layout which does not name them in `says`
PLAIN: Mapping[str, Any] = MappingProxyType(
    {
        "attention_bias": "none",
        "attention_scale": None,
        "windows": None,
        "sinks": False,
        "head_bias": False,
        "expert_bias": False,
        "rope_order": "halves",
        "norm": "rms",
        "norm_place": "before",
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "logit_divisor": 1.0,
    }
)


@dataclass(frozen=True)
class Layout:
    """Names, shapes and settings of one released architecture.

    Attributes:
        name: as people call it.
        model_type: of config.json; the key by which a folder's layout is found again.
        architecture: class that stock transformers opens it with; None = only moestro opens it.
        misfit: why a model is not exactly of this architecture, or None if it is; it need not ask for what
            `says` leaves out.
        rules: the mapping table of a model that fits.
        config: the architecture's own entries of config.json.
        says: arguments of `PLAIN` that it takes more values of, as `misfit` knows; None = all, whatever they are.
        partial: whether it can rotate a part of a head.
    """

    name: str
    model_type: str
    architecture: str | None
    misfit: Callable[[DecoderLM], str | None]
    rules: Callable[[DecoderLM], list[Rule]]
    config: Callable[[DecoderLM], dict[str, Any]]
    says: frozenset[str] | None = frozenset()
    partial: bool = False

    def why_not(self, model: DecoderLM) -> str | None:
        """Why a model is not exactly of this architecture, or None if it is."""
        return self._unsaid(model) or self.misfit(model)

    def _unsaid(self, model: DecoderLM) -> str | None:
        if self.says is None:
            return None
        config = model.config
        for name, value in PLAIN.items():
            if name not in self.says and config[name] != value:
                return f"{self.name} has {name}={value!r}, not {config[name]!r}"
        whole = config["attention"] == "latent" or config["rope_dim"] in (None, config["head_dim"])
        if whole or self.partial:
            return None
        return f"{self.name} rotates whole heads, not {config['rope_dim']} features of them"
