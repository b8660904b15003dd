"""Mapping tables between our tensors and those of a released layout.

A layout is a list of rules; each turns one tensor of ours into one or several of theirs, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One tensor of ours and what it is called and cut into on disk.

    Attributes:
        ours: name in `DecoderLM.state_dict()`.
        theirs: names in the file.
        split: our tensor to theirs, in the order of `theirs`.
        join: theirs to ours.
    """

    ours: str
    theirs: tuple[str, ...]
    split: Callable[[Tensor], Iterable[Tensor]]
    join: Callable[[list[Tensor]], Tensor]


def same(ours: str, theirs: str) -> Rule:
    """The tensor as it is."""
    return Rule(ours, (theirs,), lambda x: [x], lambda xs: xs[0])


def transposed(ours: str, theirs: str) -> Rule:
    """`[in, out]` here, `[out, in]` there."""
    return Rule(ours, (theirs,), lambda x: [x.T], lambda xs: xs[0].T)


def stacked_rows(ours: str, theirs: tuple[str, ...], sizes: tuple[int, ...]) -> Rule:
    """Matrices that we hold on top of each other, with `sizes` rows each."""
    return Rule(ours, theirs, lambda x: x.split(sizes), lambda xs: torch.cat(xs))


def per_expert(ours: str, theirs: str, num_experts: int) -> Rule:
    """`[experts, in, out]` here, one `[out, in]` per expert there; `{}` in the name stands for the expert."""
    names = tuple(theirs.format(expert) for expert in range(num_experts))
    return Rule(ours, names, lambda x: [w.T for w in x], lambda xs: torch.stack([w.T for w in xs]))


def to_theirs(rules: Iterable[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names and shapes, contiguous."""
    tensors = {}
    for rule in rules:
        parts = rule.split(state[rule.ours])
        tensors.update({name: part.contiguous() for name, part in zip(rule.theirs, parts, strict=True)})
    return tensors


def to_ours(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names and shapes.

    Raises:
        ValueError: a tensor is missing, or one is left over.
    """
    rules = list(rules)
    wanted = {name for rule in rules for name in rule.theirs}
    for problem, names in (("lacks", wanted - set(tensors)), ("has unknown", set(tensors) - wanted)):
        if names:
            raise ValueError(
                f"the model file {problem} {len(names)} tensors, among them {min(names)}; "
                "it was not saved from the model that config.json describes"
            )
    return {rule.ours: rule.join([tensors[name] for name in rule.theirs]) for rule in rules}
