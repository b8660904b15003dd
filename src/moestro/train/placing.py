"""Experts that change their process while a run trains: what is refused, what is kept, what is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moestro.balance.rebalance import Rebalancer, Replaced
from moestro.experts.migration import check_movable
from moestro.layers import MoE
from moestro.parallel import Mesh, MeshShape
from moestro.train.recipe import PlacementSection, Recipe

GROUP = "placement."  # of its tensors in a checkpoint


def check_placing(recipe: Recipe, model: nn.Module, shape: MeshShape | None) -> None:
    """Raise ValueError where moving experts would have no effect, or cannot be.

    Args:
        recipe: with or without a placement policy.
        model: before it is spread.
        shape: of the processes; None = one process alone.
    """
    section = recipe.parallel.placement
    if section.policy is None:
        return
    leave = "leave parallel.placement out"
    if shape is None or shape.expert == 1:
        where = "there is one process" if shape is None else f"{shape.words} gives every process all of them"
        raise ValueError(
            f"parallel.placement moves experts between processes, and {where}; start several (--processes N, "
            f"--mesh expert=N), or {leave} (--parallel.placement.policy none)"
        )
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError(f"parallel.placement moves experts, and a dense model has none; {leave}")
    try:
        for moe in layers:
            check_movable(moe.experts)
    except ValueError as error:
        raise ValueError(f"parallel.placement: {error}; {leave}") from None


def rebalancer_of(model: nn.Module, mesh: Mesh | None, section: PlacementSection) -> Rebalancer | None:
    """What moves the experts of a model that was spread; None where nothing does."""
    if mesh is None or section.policy is None or not any(isinstance(module, MoE) for module in model.modules()):
        return None
    return Rebalancer(
        model,
        mesh,
        every=section.every,
        policy=section.policy,
        predictor=section.predictor,
        gain=section.gain,
        history=section.history,
        speeds=section.speeds,
    )


def kept(rebalancer: Rebalancer | None) -> dict[str, Tensor]:
    """What a checkpoint keeps of it, by name."""
    return {} if rebalancer is None else {GROUP + name: value for name, value in rebalancer.state().items()}


def found(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint kept of one."""
    return {name.removeprefix(GROUP): tensors[name] for name in tensors if name.startswith(GROUP)}


def layers_of(moved: Mapping[str, Replaced]) -> list[dict[str, Any]]:
    """What events.jsonl says of each layer whose experts moved."""
    return [
        {
            "layer": layer,
            "ranks": each.placement.ranks,
            "slots": list(each.placement.expert_of_slot),
            "moved": each.moved,
            "bytes": each.bytes_sent,
            "before": each.before,
            "after": each.after,
        }
        for layer, each in moved.items()
    ]


def in_words(moved: Mapping[str, Replaced]) -> str:
    """One line for the layers that moved experts in a step."""
    each, layers = list(moved.values()), len(moved)
    total, sent = sum(one.moved for one in each), sum(one.bytes_sent for one in each)
    before, after = (
        sum(values) / layers for values in zip(*((one.before, one.after) for one in each), strict=True)
    )
    load = f"{after:.2f} times the mean load instead of {before:.2f}"
    return (
        f"{total} expert{'s' if total != 1 else ''} of {layers} layer{'s' if layers > 1 else ''} move "
        f"({sent / 2**20:,.1f} MiB): the busiest process is foreseen {load}"
    )


def summary_of(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What moved in the whole run, for result.json; empty where nothing could."""
    moves = [event for event in events if event["event"] == "placement"]
    return {
        "decisions": len(moves),
        "moved": sum(layer["moved"] for event in moves for layer in event["layers"]),
        "bytes": sum(layer["bytes"] for event in moves for layer in event["layers"]),
    }
