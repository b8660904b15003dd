"""From the sections of a recipe to a corpus and a model."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

from moestro.data import Batches, Corpus, Share, TokenFile, prepare_corpus
from moestro.methods import all_methods
from moestro.models import DecoderLM, build_language_model
from moestro.parallel import Mesh, MeshShape, Placement
from moestro.train.machine import Machine
from moestro.train.recipe import DataSection, ModelSection, Recipe
from moestro.train.team import Team

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


def build_mesh(recipe: Recipe, team: Team, machine: Machine) -> Mesh | None:
    """How the processes of a run are arranged; None where there is one. Raises as `run_mesh` does."""
    shape = run_mesh(recipe, team.size)
    return None if team.size == 1 else Mesh(shape, machine.device.type)


def run_mesh(recipe: Recipe, processes: int) -> MeshShape:
    """The mesh of a recipe for so many processes.

    Raises:
        ValueError: a mesh that these processes do not fill, experts that do not divide over it, or a batch that
            does not divide over the processes.
    """
    section, settings = recipe.model, recipe.train
    shape = mesh_shape(recipe.parallel.mesh, processes, section.num_experts if section.method else None)
    parts = shape.dense * settings.accumulate
    if settings.batch_size % parts:
        micro = f" of {settings.accumulate} micro-batches" if settings.accumulate > 1 else ""
        raise ValueError(
            f"train.batch_size={settings.batch_size}{micro} does not divide over {shape.dense} processes; "
            f"pass a multiple of {parts}"
        )
    return shape


def mesh_shape(words: str, processes: int, num_experts: int | None, slots: int | None = None) -> MeshShape:
    """The mesh that a recipe's words mean for so many processes.

    `auto` spreads the experts over as many processes as divide both numbers. An axis that is not named is 1, but
    `data`, which takes what is left.

    Args:
        words: as `mesh_words` spells them.
        processes: in the run.
        num_experts: of an MoE layer; None = a dense model, whose processes are all alike.
        slots: of its experts and their replicas; None = one for each.

    Raises:
        ValueError: a mesh that needs another number of processes, or one that the experts do not divide over.
    """
    if words == "auto":
        return MeshShape.fitting(processes, expert=math.gcd(processes, slots or num_experts or 1))
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in words.split(","))}
    expert, tensor = sizes.get("expert", 1), sizes.get("tensor", 1)
    needed = sizes["data"] * expert * tensor if "data" in sizes else None
    if needed not in (None, processes):
        raise ValueError(
            f"the mesh {words} needs {needed} processes but there are {processes}; start {needed}, or pass "
            "another --mesh, for example --mesh auto"
        )
    shape = MeshShape.fitting(processes, expert=expert, tensor=tensor)
    if num_experts is not None:
        Placement.in_turn(num_experts, expert, slots)
    return shape


def build_corpus(section: DataSection) -> Corpus:
    """The tokenised text of a recipe, from the cache where it is known; the split is the same for every seed."""
    paths = list(section.paths) or None
    return prepare_corpus(paths, section.tokenizer, cache_folder(), section.validation_fraction)


def training_batches(corpus: Corpus, recipe: Recipe, share: Share | None = None) -> Batches:
    """Batches of whole optimiser steps, in an order that only the seed decides; of a share, its rows of each."""
    size, length = recipe.train.batch_size, recipe.data.sequence_length
    return Batches(corpus.train, size, length, recipe.seed, share=share)


def validation_batches(
    file: TokenFile, batch_size: int, length: int, count: int = 0, share: Share | None = None
) -> Batches | list[Any]:
    """All validation text in order, or a sample of `count` batches that is the same for every run and model."""
    everything = Batches(file, batch_size, length, shuffle=False, share=share)
    if not 0 < count < everything.num_windows // batch_size:
        return everything
    sample = Batches(file, batch_size, length, seed=0, share=share)
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
