"""The literature catalogue as a table: what each of its entries is in this library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moestro.cli.parts import SLOTS

if TYPE_CHECKING:
    from moestro.layers import MoE
    from moestro.methods import Method

PREFACE = """\
What each entry of the literature catalogue is here: the method, its router with the parts in its slots, the losses
with their coefficients, and the controllers and schedules that act after a step; all with default options."""


def catalogue_page() -> list[str]:
    """The lines of a section that says for each catalogue id which method and parts it is."""
    from moestro.methods import all_methods

    lines = ["## By catalogue id", "", PREFACE, ""]
    lines += [
        "| catalogue id | method | router and parts | losses | controllers and schedules |",
        "|---|---|---|---|---|",
    ]
    layers = sample_layers()
    for method in sorted(all_methods().values(), key=lambda method: (method.catalogue, method.name)):
        if "moestro/methods/" not in method.file:
            continue  # a plug-in's
        moe = layers[method.name]
        cells = [f"`{method.catalogue}`", f"`{method.name}`", _router(moe), _losses(moe), _controllers(moe)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sample_layers() -> dict[str, MoE]:
    """A small layer of every method, with default options where they fit 16 experts."""
    from moestro.methods import all_methods

    return {name: sample_layer(method) for name, method in all_methods().items()}


def sample_layer(method: Method) -> MoE:
    """A small layer of a method: 16 experts, width 16, two domains, 32 token ids."""
    from moestro import build

    needed: dict[str, Any] = {"vocab_size": 32, "num_domains": 2}
    options = {name: value for name, value in needed.items() if name in method.options}
    return build(method.name, width=16, hidden=16, num_experts=16, **options)


def _router(moe: MoE) -> str:
    parts = [_name(moe.router)]
    parts += [f"{slot} {_name(part)}" for slot in SLOTS if (part := getattr(moe.router, slot, None)) is not None]
    return ", ".join(part for part in parts if "NoNoise" not in part)


def _name(part: Any) -> str:
    """A part with the parts that it wraps: `BiasedSelection(GroupLimitedTopK)`."""
    from torch import nn

    name = getattr(part, "__name__", type(part).__name__)
    inner = [getattr(part, slot, None) for slot in ("select", "capacity", "scorer", "router")]
    wrapped = [] if hasattr(part, "weigh") else [each for each in inner if isinstance(each, nn.Module)]
    return f"{name}({', '.join(map(_name, wrapped))})" if wrapped else name


def _losses(moe: MoE) -> str:
    return ", ".join(f"{coefficient:g} × {_loss(loss)}" for coefficient, loss in moe.losses.values()) or "none"


def _loss(loss: Any) -> str:
    name, inner = type(loss).__name__, getattr(loss, "loss", None)
    if inner is not None and name != "SequenceBalance":
        return f"{name}({_loss(inner)})"
    convention = getattr(loss, "convention", None)
    return f"{name}({convention})" if name == "LoadTimesProbability" else name


def _controllers(moe: MoE) -> str:
    return ", ".join(map(repr, moe.controllers)) or "none"
