"""Models in which some matrices are 8-bit or 4-bit codes: which ones, and room for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from moestro.experts import GLU, MLP, FeedForward, QuantisedExperts, QuantisedFeedForward, QuantisedLinear
from moestro.models.decoder import DecoderLM

Quantised = QuantisedExperts | QuantisedLinear | QuantisedFeedForward


def quantised_parts(model: DecoderLM) -> dict[str, dict[str, int]]:
    """Bits and group of every quantised module, by its name; empty for a model in float."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Quantised)}
    outer = {name: module for name, module in modules.items() if name.rpartition(".")[0] not in modules}
    return {name: {"bits": module.bits, "group": module.group} for name, module in outer.items()}


def make_room(model: DecoderLM, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace modules by quantised ones whose codes are still to come, in place.

    Args:
        model: in float.
        parts: as `quantised_parts` says.

    Raises:
        ValueError: a part that the model does not have, or that is described wrongly.
    """
    modules = dict(model.named_modules())
    for name, facts in parts.items():
        if not isinstance(facts, Mapping) or set(facts) != {"bits", "group"}:
            raise ValueError(f"config.json must say bits and group of {name}, got {facts!r}; restore the file")
        parent, _, child = name.rpartition(".")
        room = _room(name, modules.get(name), facts["bits"], facts["group"])
        setattr(model.get_submodule(parent), child, room)


def _room(name: str, module: nn.Module | None, bits: int, group: int) -> Quantised:
    if isinstance(module, nn.Linear):
        return QuantisedLinear.like(module, bits, group)
    if isinstance(module, GLU | MLP):
        return QuantisedExperts.like(module, bits, group)
    if isinstance(module, FeedForward):
        return QuantisedFeedForward.like(module, bits, group)
    raise ValueError(
        f"config.json says that {name} is quantised, but the model it describes has no such part; restore the file"
    )
