"""Which sizes give a method the active parameters that all others have."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moestro.methods import find_method
from moestro.models import DecoderLM
from moestro.study.recipe import Entry, StudyRecipe
from moestro.train.build import build_model
from moestro.train.recipe import ModelSection

TOLERANCE = 0.01
"""Share of the dense model's parameters by which a method's active ones may differ."""


@dataclass(frozen=True)
class Match:
    """A method at the size at which it is compared.

    Attributes:
        model: section of the training recipe.
        active: parameters that one token uses.
        total: all of them.
        off: active over those of the dense model, minus 1.
        note: why it could not be matched; empty when it is.
    """

    model: ModelSection
    active: int
    total: int
    off: float = 0.0
    note: str = ""


def dense_model(study: StudyRecipe) -> ModelSection:
    """The dense model that every method is compared with."""
    values = study.model.model_dump() | {"method": None, "options": {}, "dense_hidden": study.dense_hidden}
    return ModelSection.model_validate(values)


def match(study: StudyRecipe, entry: Entry, vocab_size: int, num_domains: int) -> Match:
    """The hidden size of an expert at which `entry` comes nearest to the dense model's active parameters.

    Active parameters grow in a straight line with the hidden size, so two models tell where to look; the sizes next
    to that point are built and counted. A method that is more than 1 % off even so says it in its note.

    Args:
        study: sizes, and the experts per token of methods that let one choose.
        entry: method and options; a hidden size of its own is kept.
        vocab_size: token ids.
        num_domains: sources of the text.

    Raises:
        ValueError: the method cannot be built at this size; says why.
    """

    def built(section: ModelSection) -> DecoderLM:
        length = study.data.sequence_length
        return build_model(section, vocab_size=vocab_size, sequence_length=length, seed=0, num_domains=num_domains)

    target = built(dense_model(study)).parameter_counts().active
    sections = _candidates(study, entry, built, target)
    found: list[Match] = []
    for section in sections:
        with suppress(ValueError):  # a size that this method cannot have; another one fits
            counts = built(section).parameter_counts()
            found.append(Match(section, counts.active, counts.total, counts.active / target - 1))
    if not found:
        built(sections[0])  # raises the reason
    best = min(found, key=lambda one: abs(one.off))
    return best if abs(best.off) <= TOLERANCE else _with_note(best)


def _candidates(study: StudyRecipe, entry: Entry, built: Any, target: int) -> list[ModelSection]:
    if entry.expert_hidden is not None:
        return [_section(study, entry, entry.expert_hidden)]
    start = study.model.expert_hidden
    here, there = (built(_section(study, entry, hidden)).parameter_counts().active for hidden in (start, 2 * start))
    if there == here:
        return [_section(study, entry, start)]
    near = round(start + (target - here) * start / (there - here))
    return [_section(study, entry, hidden) for hidden in range(max(1, near - 2), max(2, near + 3))]


def _section(study: StudyRecipe, entry: Entry, hidden: int) -> ModelSection:
    values = study.model.model_dump()
    values |= {"method": entry.method, "options": _options(study, entry), "expert_hidden": hidden}
    values |= {"num_experts": entry.num_experts or study.model.num_experts}
    return ModelSection.model_validate(values)


def _options(study: StudyRecipe, entry: Entry) -> dict[str, Any]:
    """The entry's own, and at most the study's experts per token."""
    default = find_method(entry.method).options.get("top_k")
    if default is None or "top_k" in entry.options or not isinstance(default.default, int):
        return entry.options
    return {"top_k": min(default.default, study.top_k)} | entry.options


def _with_note(found: Match) -> Match:
    more = "more" if found.off > 0 else "fewer"
    note = f"{abs(found.off):.1%} {more} active parameters: no hidden size comes nearer"
    return Match(found.model, found.active, found.total, found.off, note)
