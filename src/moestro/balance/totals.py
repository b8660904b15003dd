"""Auxiliary losses over recorded decisions, alone or as shares of the loss of a whole optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.balance.loss import Loss, added, share_of
from moestro.routing import Decision

Layers = Literal["sum", "mean", "pooled"]
Key = tuple[str, str, int]
NamedLosses = Mapping[str, tuple[float, Callable[[Decision], Tensor]]]


@dataclass(frozen=True)
class Term:
    """One auxiliary loss over the decisions that are counted together.

    Attributes:
        title: name of the loss, e.g. "balance".
        place: name of the layer; "" if layers are pooled.
        call: which call of the layer, 0 being the first.
        coefficient: weight in the sum of all terms.
        loss: of sums, or for micro-batches alone any function of a Decision.
        decisions: one, or those of all layers.
    """

    title: str
    place: str
    call: int
    coefficient: float
    loss: Callable[[Decision], Tensor]
    decisions: tuple[Decision, ...]

    @property
    def key(self) -> Key:
        """The same for every micro-batch."""
        return self.title, self.place, self.call

    def sums(self) -> dict[str, Tensor]:
        """What these decisions add to the loss of a whole."""
        loss = self._of_sums()
        return added(loss.sums(decision) for decision in self.decisions)

    def value(self, totals: StepTotals | None = None) -> tuple[Tensor, Tensor]:
        """What to differentiate, and the loss itself; both the same without totals."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.coefficient != 0):
            if totals is not None:
                return share_of(self._of_sums(), self.sums(), totals.of(self.key), totals.parts)
            if len(self.decisions) == 1:
                value = self.loss(self.decisions[0])
            else:
                value = self._of_sums().value(self.sums())
            return value, value.detach()

    def _of_sums(self) -> Loss:
        if not isinstance(self.loss, Loss):
            raise ValueError(
                f"the loss {self.title!r} is a function of one Decision, which cannot be added up over a step or "
                "over layers; derive it from moestro.balance.Loss"
            )
        return self.loss


def terms_of(
    decisions: Mapping[str, Sequence[Decision]], losses: Mapping[str, NamedLosses], layers: Layers = "sum"
) -> list[Term]:
    """The terms of recorded decisions.

    Args:
        decisions: by layer, one for each call of it.
        losses: by layer, each by name with its coefficient.
        layers: `sum` and `mean` treat each layer by itself; `pooled` counts all layers' tokens together.

    Raises:
        ValueError: pooled layers whose losses of one name differ.
    """
    if layers not in ("sum", "mean", "pooled"):
        raise ValueError(f"layers={layers!r} must be sum, mean or pooled")
    if layers == "pooled":
        return list(_pooled(decisions, losses))
    found = [(place, title) for place, named in losses.items() for title in named if decisions.get(place)]
    number = {title: sum(other == title for _, other in found) if layers == "mean" else 1 for _, title in found}
    return [
        Term(title, place, call, losses[place][title][0] / number[title], losses[place][title][1], (decision,))
        for place, title in found
        for call, decision in enumerate(decisions[place])
    ]


def _pooled(decisions: Mapping[str, Sequence[Decision]], losses: Mapping[str, NamedLosses]) -> Iterator[Term]:
    for title in dict.fromkeys(title for named in losses.values() for title in named):
        named = {place: each[title] for place, each in losses.items() if title in each and decisions.get(place)}
        if not named:
            continue
        coefficient, loss = next(iter(named.values()))
        if any(each[0] != coefficient or not _same(each[1], loss) for each in named.values()):
            raise ValueError(f"layers differ in their loss {title!r}, so they cannot be pooled; use layers='sum'")
        pooled = tuple(decision for place in named for decision in decisions[place])
        yield Term(title, "", 0, coefficient, loss, pooled)


def _same(loss: object, other: object) -> bool:
    """Whether two losses are one function; those with a state of their own never are."""
    if loss is other:
        return True
    return type(loss) is type(other) and not isinstance(loss, nn.Module) and vars(loss) == vars(other)


class StepTotals:
    """Sums of every auxiliary loss over all parts of an optimiser step: micro-batches, and ranks.

    With them a part knows the slopes of the loss of the whole step, so that the gradients of the parts add up to
    the gradient of one big batch; see `moestro.balance.loss.share_of`.

    Attributes:
        parts: micro-batches of this process.
    """

    def __init__(self) -> None:
        self._sums: dict[Key, dict[str, Tensor]] = {}
        self.parts = 0

    @torch.no_grad()
    def add(self, terms: Sequence[Term]) -> None:
        """Add one micro-batch."""
        for term in terms:
            sums = {name: _exact(each) for name, each in term.sums().items()}
            self._sums[term.key] = added([self._sums.get(term.key, {}), sums])
        self.parts += 1

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up over the ranks of a group (None = all), if torch.distributed runs.

        The gradients of all ranks then have to be summed; where they are averaged, multiply by the number of ranks.
        """
        if dist.is_available() and dist.is_initialized():
            for key in sorted(self._sums):
                for name in sorted(self._sums[key]):
                    dist.all_reduce(self._sums[key][name], group=group)

    def of(self, key: Key) -> dict[str, Tensor]:
        """The sums of one term, or ValueError if the first pass did not see it."""
        if key not in self._sums:
            raise ValueError(
                f"the first pass saw no call {key[2]} of layer {key[1]!r}; run the same micro-batches twice"
            )
        return self._sums[key]


def _exact(each: Tensor) -> Tensor:
    return each.detach().double() if each.is_floating_point() else each.detach().clone()
