"""What a run says of the processes that share it, and of settings that change nothing with so many."""

from __future__ import annotations

from collections.abc import Sequence

from moestro.layers import MoE
from moestro.models import DecoderLM
from moestro.parallel import MeshShape
from moestro.train.recipe import ParallelSection, Recipe


def company(recipe: Recipe, model: DecoderLM, shape: MeshShape | None) -> list[str]:
    """How many processes share the run, and what that changes; one line each.

    Args:
        recipe: of the run.
        model: before or after it is spread.
        shape: of the processes; None = one process alone.
    """
    if shape is None:
        return _idle(recipe.parallel, model, None)
    section, placement = recipe.parallel, recipe.parallel.placement
    lines = [f"processes: {shape.ranks} ({shape.words}), transport {section.transport}"]
    lines += _idle(section, model, shape)
    if placement.policy is not None:
        lines.append(
            f"placement: {placement.policy} decides every {placement.every} steps; experts move when the busiest "
            f"process would otherwise have {placement.gain:g} times as much to do"
        )
    if not model.batch_independent:
        lines.append("routing looks at the tokens of one process at a time: the run will differ from one process")
    return lines


def _idle(section: ParallelSection, model: DecoderLM, shape: MeshShape | None) -> list[str]:
    """A line for what the section asks for and these processes cannot do; it is no error, as a run may go on with
    fewer processes than it began with."""
    changed = [key for key, field in ParallelSection.model_fields.items() if getattr(section, key) != field.default]
    if shape is None:
        idle = [key for key in changed if key not in ("mesh", "placement")]  # these are refused
        return [_without_effect(idle, "in one process; start several with --processes N")] if idle else []
    lines = []
    sparse, spreads = any(isinstance(module, MoE) for module in model.modules()), shape.expert * shape.tensor > 1
    if not sparse:
        idle = [key for key in changed if key == "transport" or (key == "mesh" and spreads)]
        lines += [_without_effect(idle, "on a dense model")] if idle else []
    elif "transport" in changed and not spreads:
        lines.append(_without_effect(["transport"], f"where {shape.words} gives every process all experts"))
    if section.shard_optimiser and section.shard_dense and (shape.data == 1 or not sparse):
        lines.append(_without_effect(["shard_optimiser"], "besides shard_dense, which shares out what it would"))
    return lines


def _without_effect(keys: Sequence[str], why: str) -> str:
    *others, last = (f"parallel.{key}" for key in keys)
    names = f"{', '.join(others)} and {last} have" if others else f"{last} has"
    return f"{names} no effect {why}"
