"""From the sections of a recipe to a corpus and a model."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from moestro.data import Batches, Corpus, TokenFile, prepare_corpus
from moestro.methods import all_methods
from moestro.models import DecoderLM, build_language_model
from moestro.train.recipe import DataSection, ModelSection, Recipe

MIN_MAX_LENGTH = 2048  # rotary positions cost nothing to have, and text may be generated past the trained length


def build_model(
    section: ModelSection, *, vocab_size: int, sequence_length: int, seed: int, num_domains: int | None = None
) -> DecoderLM:
    """The language model that a recipe describes; ValueError when its parts do not fit.

    Args:
        section: the recipe's.
        vocab_size: token ids.
        sequence_length: tokens in a sequence.
        seed: of the weights.
        num_domains: sources of the text, for methods with that option, unless the recipe gives it.
    """
    arguments: dict[str, Any] = section.model_dump()
    if num_domains is not None and takes_domains(section.method):
        arguments["options"] = {"num_domains": num_domains} | arguments["options"]
    max_length = max(MIN_MAX_LENGTH, sequence_length)
    return build_language_model(vocab_size=vocab_size, max_length=max_length, seed=seed, **arguments)


def takes_domains(name: str | None) -> bool:
    """Whether a method has parts for each source of the text."""
    method = all_methods().get(name or "")
    return method is not None and "num_domains" in method.options


def build_corpus(section: DataSection) -> Corpus:
    """The tokenised text of a recipe, from the cache where it is known; the split is the same for every seed."""
    paths = list(section.paths) or None
    return prepare_corpus(paths, section.tokenizer, cache_folder(), section.validation_fraction)


def training_batches(corpus: Corpus, recipe: Recipe) -> Batches:
    """Batches of whole optimiser steps, in an order that only the seed decides."""
    return Batches(corpus.train, recipe.train.batch_size, recipe.data.sequence_length, recipe.seed)


def validation_batches(file: TokenFile, batch_size: int, length: int, count: int = 0) -> Batches | list[Any]:
    """All validation text in order, or a sample of `count` batches that is the same for every run and model."""
    everything = Batches(file, batch_size, length, shuffle=False)
    if not 0 < count < everything.num_windows // batch_size:
        return everything
    sample = Batches(file, batch_size, length, seed=0)
    return [sample.at(i) for i in range(count)]


def cache_folder() -> Path:
    """Where token files are kept: MOESTRO_CACHE, else the user's cache folder, else a temporary one."""
    named = os.environ.get("MOESTRO_CACHE")
    if named:
        return Path(named)
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "moestro"
    try:
        user.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir()) / f"moestro-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    return user if os.access(user, os.W_OK) else Path(tempfile.gettempdir()) / f"moestro-{os.getuid()}"
