"""The parts that a layer is assembled from, as a plain tree: what fills each slot, its settings and its file."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestro.layers import MoE

SLOTS = ("scorer", "noise", "gate", "select", "weigh", "capacity")  # in the order a token meets them
SIMPLE = (int, float, str, bool)


@dataclass(frozen=True)
class Part:
    """One part of a layer.

    Attributes:
        slot: the attribute that holds it, e.g. `select`.
        name: its class or function, e.g. `TopK`.
        settings: what it was built with, e.g. `k=2`.
        file: where it is written, e.g. `moestro/routers/selects.py`.
        parameters: shapes of its own parameters and buffers.
        parts: what it is made of.
    """

    slot: str
    name: str
    settings: str
    file: str
    parameters: dict[str, list[int]]
    parts: tuple[Part, ...]


def describe_parts(moe: MoE) -> tuple[Part, ...]:
    """The router, the experts and the shared expert of a layer, each with its parts.

    Args:
        moe: a layer, e.g. `moestro.build("switch", width=64, hidden=128, num_experts=8)`.
    """
    slots = {"router": moe.router, "experts": moe.experts, "shared": moe.shared}
    return tuple(describe_part(slot, part) for slot, part in slots.items() if part is not None)


def describe_part(slot: str, part: Any) -> Part:
    """One part and everything in it; `part` is a module, a function or a small callable object."""
    function = part.func if isinstance(part, functools.partial) else part
    kind = function if inspect.isroutine(function) else type(function)
    return Part(slot, kind.__name__, _settings(part), source_file(kind), _parameters(part), _children(part))


def source_file(kind: Any) -> str:
    """The file of a class or function, from its package on: `moestro/routers/gates.py`."""
    try:
        file = Path(inspect.getsourcefile(kind) or "")
    except TypeError:  # built in, perhaps without a module
        return str(getattr(kind, "__module__", "built in"))
    depth = str(kind.__module__).count(".") + 1 + (file.name == "__init__.py")
    return "/".join(file.parts[-depth:])


def _children(part: Any) -> tuple[Part, ...]:
    from torch import nn

    from moestro.routers import Router

    if not isinstance(part, nn.Module):
        return ()
    found: dict[str, Any] = dict(part.named_children())
    if isinstance(part, Router):  # its slots may also hold plain functions
        found |= {name: value for name, value in vars(part).items() if _is_public(name) and callable(value)}
    order = {slot: place for place, slot in enumerate(SLOTS)}
    names = sorted(found, key=lambda name: order.get(name, len(SLOTS)))
    return tuple(describe_part(name, found[name]) for name in names)


def _settings(part: Any) -> str:
    from torch import nn

    if isinstance(part, nn.Module):
        return part.extra_repr() or _spell(_own_values(part))
    if isinstance(part, functools.partial):
        return _spell(part.keywords)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return _spell({field.name: getattr(part, field.name) for field in dataclasses.fields(part)})
    return "" if inspect.isroutine(part) else _spell(_own_values(part))


def _own_values(part: Any) -> dict[str, Any]:
    """Public simple attributes; a router's facts about itself are told elsewhere."""
    facts = ("training", "num_experts", "top_k", "causal", "batch_independent")
    return {
        name: value
        for name, value in vars(part).items()
        if _is_public(name) and name not in facts and isinstance(value, SIMPLE)
    }


def _parameters(part: Any) -> dict[str, list[int]]:
    from torch import nn

    if not isinstance(part, nn.Module):
        return {}
    tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
    return {name: list(tensor.shape) for name, tensor in tensors}


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _spell(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
