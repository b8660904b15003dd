"""Mapping tables between our tensors and those of a released layout.

A layout is a list of rules; each turns one or several tensors of ours into one or several of theirs, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Many = Callable[[Sequence[Tensor]], Iterable[Tensor]]


@dataclass(frozen=True)
class Rule:
    """Tensors of ours and what they are called and cut into on disk.

    Attributes:
        ours: names in `DecoderLM.state_dict()`, of tensors of one shape where there are several.
        theirs: names in the file.
        split: our tensors, in the order of `ours`, to theirs, in the order of `theirs`.
        join: theirs to ours.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    split: Many
    join: Many


def same(ours: str, theirs: str) -> Rule:
    """The tensor as it is."""
    return Rule((ours,), (theirs,), lambda x: x, lambda x: x)


def transposed(ours: str, theirs: str) -> Rule:
    """`[in, out]` here, `[out, in]` there."""
    return Rule((ours,), (theirs,), lambda x: [x[0].T], lambda x: [x[0].T])


def stacked_rows(ours: str, theirs: tuple[str, ...], sizes: tuple[int, ...]) -> Rule:
    """Matrices that we hold on top of each other, with `sizes` rows each."""
    return Rule((ours,), theirs, lambda x: x[0].split(sizes), lambda x: [torch.cat(list(x))])


def per_expert(ours: str, theirs: str, num_experts: int) -> Rule:
    """`[experts, in, out]` here, one `[out, in]` per expert there; `{}` in the name stands for the expert."""
    names = tuple(theirs.format(expert) for expert in range(num_experts))
    return Rule((ours,), names, lambda x: [w.T for w in x[0]], lambda x: [torch.stack([w.T for w in x])])


def joined(ours: tuple[str, ...], theirs: str, axis: int, *, transpose: bool = False) -> Rule:
    """Tensors that they hold in one, behind each other along an axis, their last two axes swapped or not."""

    def split(x: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.cat([part.mT if transpose else part for part in x], dim=axis)]

    def join(x: Sequence[Tensor]) -> Sequence[Tensor]:
        return [part.mT if transpose else part for part in x[0].chunk(len(ours), dim=axis)]

    return Rule(ours, (theirs,), split, join)


def interleaved(ours: tuple[str, ...], theirs: str) -> Rule:
    """Tensors that they hold in one whose last axis takes from each in turn."""
    count = len(ours)
    return Rule(
        ours,
        (theirs,),
        lambda x: [torch.stack(list(x), dim=-1).flatten(-2)],
        lambda x: [x[0][..., index::count] for index in range(count)],
    )


def to_theirs(rules: Iterable[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names and shapes, contiguous."""
    tensors = {}
    for rule in rules:
        parts = rule.split([state[name] for name in rule.ours])
        tensors.update({name: part.contiguous() for name, part in zip(rule.theirs, parts, strict=True)})
    return tensors


def to_ours(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names and shapes.

    Raises:
        ValueError: a tensor is missing, or one is left over.
    """
    rules = list(rules)
    state: dict[str, Tensor] = {}
    wanted = {name for rule in rules for name in rule.theirs}
    for problem, names in (("lacks", wanted - set(tensors)), ("has unknown", set(tensors) - wanted)):
        if names:
            raise ValueError(
                f"the model file {problem} {len(names)} tensors, among them {min(names)}; "
                "it was not saved from the model that config.json describes"
            )
    for rule in rules:
        state.update(zip(rule.ours, rule.join([tensors[name] for name in rule.theirs]), strict=True))
    return state
