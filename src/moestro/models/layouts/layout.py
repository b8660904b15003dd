"""What a layout is: a way to write one kind of model to disk so that others can read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moestro.models.decoder import DecoderLM
from moestro.models.layouts.rules import Rule


@dataclass(frozen=True)
class Layout:
    """Names, shapes and settings of one released architecture.

    Attributes:
        name: as people call it.
        model_type: of config.json; the key by which a folder's layout is found again.
        architecture: class that stock transformers opens it with; None = only moestro opens it.
        misfit: why a model is not exactly of this architecture, or None if it is.
        rules: the mapping table of a model that fits.
        config: the architecture's own entries of config.json.
    """

    name: str
    model_type: str
    architecture: str | None
    misfit: Callable[[DecoderLM], str | None]
    rules: Callable[[DecoderLM], list[Rule]]
    config: Callable[[DecoderLM], dict[str, Any]]
