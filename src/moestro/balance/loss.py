"""What an auxiliary loss is: a function of sums over tokens, so that it is exact however a batch is split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.balance.counts import valid_tokens
from moestro.routing import Decision

Sums = Mapping[str, Tensor]


class Loss(ABC):
    """A number from sums of one decision or several.

        loss = value(sums)        sums add up over calls, micro-batches, layers and ranks; values do not

    Called with a Decision it is the loss of that decision alone.
    """

    @abstractmethod
    def sums(self, decision: Decision) -> dict[str, Tensor]:
        """What one decision adds, by name; shapes do not depend on the number of tokens."""

    @abstractmethod
    def value(self, sums: Sums) -> Tensor:
        """The loss; 0 if there was no valid token. Leading dimensions of the sums are kept."""

    def __call__(self, decision: Decision) -> Tensor:
        """The loss of one decision, a scalar; raises ValueError if it lacks what the loss needs."""
        return self.value(self.sums(decision))


class TokenLoss(Loss):
    """A loss whose sums are sums over valid tokens; `tokens` counts them."""

    @abstractmethod
    def terms(self, decision: Decision) -> dict[str, Tensor]:
        """What each token adds, `[tokens, ...]` by name; padding need not be thought of."""

    def sums(self, decision: Decision) -> dict[str, Tensor]:
        terms, valid = masked_terms(self, decision)
        return {name: each.sum(0) for name, each in terms.items()} | {"tokens": valid.sum()}


class TokenMean(TokenLoss):
    """A loss that is the mean over valid tokens of `each`."""

    @abstractmethod
    def each(self, decision: Decision) -> Tensor:
        """The loss of every token, `[tokens]`."""

    def terms(self, decision: Decision) -> dict[str, Tensor]:
        return {"loss": self.each(decision)}

    def value(self, sums: Sums) -> Tensor:
        return sums["loss"] / sums["tokens"].clamp(min=1)


@dataclass(frozen=True)
class PerSequence(Loss):
    """A loss inside each sequence, averaged over the sequences that have a valid token.

        mean over sequences of loss(tokens of the sequence)

    The tokens of a sequence must be in one call: a sequence split over two counts as two.

    Attributes:
        loss: what is taken of each sequence.
    """

    loss: TokenLoss

    def sums(self, decision: Decision) -> dict[str, Tensor]:
        terms, valid = masked_terms(self.loss, decision)
        sequence = decision.notes.get("sequence")
        if sequence is None:
            group, count = torch.zeros_like(valid, dtype=torch.long), min(len(valid), 1)
        else:
            names, group = sequence.unique(return_inverse=True)
            count = len(names)
        terms = terms | {"tokens": valid.long()}
        each = {
            name: term.new_zeros(count, *term.shape[1:]).index_add(0, group, term) for name, term in terms.items()
        }
        present = each["tokens"] > 0
        return {"loss": self.loss.value(each).masked_fill(~present, 0).sum(), "sequences": present.sum()}

    def value(self, sums: Sums) -> Tensor:
        return sums["loss"] / sums["sequences"].clamp(min=1)


def masked_terms(loss: TokenLoss, decision: Decision) -> tuple[dict[str, Tensor], Tensor]:
    """Terms of a loss, 0 at padding, and the valid tokens `[tokens]` bool."""
    terms = loss.terms(decision)
    valid = valid_tokens(decision, len(next(iter(terms.values()))))
    return {name: _masked(each, valid) for name, each in terms.items()}, valid


def added(each: Iterable[Sums]) -> dict[str, Tensor]:
    """Sums of several decisions, added up."""
    total: dict[str, Tensor] = {}
    for sums in each:
        total = {name: total[name] + value if name in total else value for name, value in sums.items()}
    return total


def share_of(loss: Loss, sums: Sums, total: Sums, parts: int) -> tuple[Tensor, Tensor]:
    """One part's share of the loss of a whole, and the loss of the whole.

        share = value(total) / parts,   d share = sum_n dvalue/dtotal_n(total) d sums_n

    The gradients of the parts add up to that of `value(total)` exactly: only the slopes need the whole, and they
    are numbers by the time that a part is differentiated.

    Args:
        loss: a function of sums.
        sums: of this part, with a graph.
        total: of all parts, without one.
        parts: how many there are; the values of their shares add up to the loss.
    """
    exact = {name: each.detach().double() if each.is_floating_point() else each for name, each in total.items()}
    leaves = {name: each.requires_grad_() for name, each in exact.items() if each.is_floating_point()}
    with torch.enable_grad():
        value = loss.value(exact)
    whole = value.detach()
    dtype = next((each.dtype for each in sums.values() if each.is_floating_point()), whole.dtype)
    whole = whole.to(dtype)
    if not (torch.is_grad_enabled() and value.requires_grad):
        return whole / parts, whole
    slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    share = torch.zeros_like(whole)
    for name, slope in zip(leaves, slopes, strict=True):
        if slope is not None and sums[name].requires_grad:
            share = share + (slope.to(sums[name].dtype) * sums[name]).sum()
    return share + (whole / parts - share.detach()), whole


def _masked(each: Tensor, valid: Tensor) -> Tensor:
    return each.masked_fill(~valid.view(-1, *[1] * (each.dim() - 1)), 0)
