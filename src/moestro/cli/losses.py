"""`moestro losses`: list what keeps experts busy: losses, controllers and capacity policies."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from moestro.cli.parts import source_file
from moestro.cli.terminal import console, print_json, print_table

if TYPE_CHECKING:
    from moestro.balance.catalogue import Balancing

app = App(
    name="losses",
    help_epilogue="""\
Examples:
  moestro losses
  moestro losses --kind controller
  moestro losses --json""",
)
COLUMNS = ("name", "even", "counted", "paper", "formula")
HEADERS = ("name", "when even", "counted", "paper", "formula")
CHOICES = """\
When even: the value with even choices and uniform probabilities, of E experts, k choices, D groups.
Statistics: PerSequence(loss) for each sequence, GroupBalance for each device, GlobalBatchBalance for all ranks;
train.statistics is micro-batch, or step for all tokens of an optimiser step, exactly.
Layers: train.layers is sum, mean, or pooled (one loss of all layers' tokens)."""


@app.default
def losses(
    *,
    kind: str | None = None,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """List what keeps experts busy: losses, controllers, capacities.

    Args:
        kind: one kind only: loss, controller or capacity.
        json: print everything known about them, for machines.
    """
    from moestro.balance.catalogue import BALANCINGS

    kinds = list(dict.fromkeys(balancing.kind for balancing in BALANCINGS))
    if kind is not None and kind not in kinds:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(kinds)}")
    rows = [balancing_facts(each) for each in BALANCINGS if kind in (None, each.kind)]
    if json:
        print_json([row | {"methods": used} for row, used in zip(rows, _users(rows), strict=True)])
        return
    for name in dict.fromkeys(row["kind"] for row in rows):
        console().print(f"{name}\n")
        print_table([row for row in rows if row["kind"] == name], COLUMNS, HEADERS, one_line=True)
        console().print()
    console().print(CHOICES)


def balancing_facts(balancing: Balancing) -> dict[str, Any]:
    """What is known about one way of balancing, as plain values."""
    facts = {field.name: getattr(balancing, field.name) for field in dataclasses.fields(balancing)}
    facts |= {"part": balancing.part.__name__, "even": balancing.even or None}
    return {"name": balancing.name, **facts, "file": source_file(balancing.part)}


def _users(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The methods that use each part by default."""
    from moestro.cli.catalogue import sample_layers

    parts = {name: _parts(moe) for name, moe in sample_layers().items()}
    return [[name for name, used in parts.items() if row["name"] in used or row["part"] in used] for row in rows]


def _parts(moe: Any) -> set[str]:
    held = [loss for _, loss in moe.losses.values()] + moe.controllers + list(moe.router.modules())
    held += [inner for each in held if (inner := getattr(each, "loss", None)) is not None]
    return {_called(each) for each in held}


def _called(part: Any) -> str:
    name, convention = type(part).__name__, getattr(part, "convention", None)
    return f'{name}("{convention}")' if name == "LoadTimesProbability" else name
