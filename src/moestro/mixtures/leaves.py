"""Experts that learn from one row at a time: the leaves of the on-line mixtures (Jordan & Jacobs 1994)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import numpy as np

from moestro.mixtures.gates.base import Params
from moestro.mixtures.numerics import Array, softmax_rows


class Leaves(ABC):
    """All experts of one mixture, changed in place; `copy` before learning keeps a failed call from half a change.

    Args:
        coef: `[experts, p, columns]`.
        prior: R of the first row over the identity, the inverse of a ridge.
        forgetting: λ of the first row; it rises to 1.
    """

    def __init__(self, coef: Array, prior: float, forgetting: float):
        self.coef, self.forgetting = coef, forgetting
        num, width, columns = coef.shape
        self.spread = np.tile(prior * np.eye(width), (num, self._per_expert(columns), 1, 1))  # R

    @abstractmethod
    def _per_expert(self, columns: int) -> int:
        """How many matrices R an expert has."""

    @abstractmethod
    def log_prob(self, row: Array, target: Array) -> Array:
        """`log f_i(target | row)` up to what all experts share, `[experts]`."""

    @abstractmethod
    def learn(self, row: Array, target: Array, share: Array, weight: float, seen: int) -> None:
        """One row of some weight, held by the experts to the given shares `[experts]`."""

    @abstractmethod
    def params(self) -> Params:
        """The numbers as the expert of a `Mixture` wants them."""

    def copy(self) -> Self:
        other = object.__new__(type(self))
        for name, value in self.__dict__.items():
            setattr(other, name, value.copy() if isinstance(value, np.ndarray) else value)
        return other

    def _gain(self, row: Array, weight: Array, seen: int) -> Array:
        """Takes a row of weights `[experts, matrices]` into R and returns `R row`, `[experts, matrices, p]`.

        R ← (R - w R z zᵀR / (λ + w zᵀR z)) / λ
        """
        keep = 1 - (1 - self.forgetting) * 0.999**seen
        direction = self.spread @ row
        scale = weight / (keep + weight * (direction @ row))
        self.spread -= scale[:, :, None, None] * direction[:, :, :, None] * direction[:, :, None, :]
        self.spread /= keep
        if seen % 100 == 99:  # rounding would make R lopsided
            self.spread[:] = 0.5 * (self.spread + self.spread.swapaxes(2, 3))
        return self.spread @ row


class LinearLeaves(Leaves):
    """Normal experts by recursive least squares; each output has its own variance."""

    def __init__(self, coef: Array, prior: float, forgetting: float):
        super().__init__(coef, prior, forgetting)
        self.variance = np.ones((len(coef), coef.shape[2]))

    def _per_expert(self, columns: int) -> int:
        return 1

    def _error(self, row: Array, target: Array) -> Array:
        error: Array = target - np.einsum("p,epq->eq", row, self.coef)
        return error

    def log_prob(self, row: Array, target: Array) -> Array:
        value: Array = -0.5 * (self._error(row, target) ** 2 / self.variance + np.log(self.variance)).sum(1)
        return value

    def learn(self, row: Array, target: Array, share: Array, weight: float, seen: int) -> None:
        error, mass = self._error(row, target), weight * share
        gain = self._gain(row, mass[:, None], seen)[:, 0]
        self.coef += mass[:, None, None] * gain[:, :, None] * error[:, None, :]
        pace = 1 - (1 - 0.01 * share) ** weight
        self.variance += pace[:, None] * (error**2 - self.variance)
        np.maximum(self.variance, 1e-6, out=self.variance)

    def params(self) -> Params:
        covariance = self.variance[:, :, None] * np.eye(self.coef.shape[2])
        return {"coef": self.coef.copy(), "covariance": covariance}


class LogitLeaves(Leaves):
    """Multinomial experts by Newton steps of one row: R gathers the curvature `h p_c (1 - p_c) z zᵀ` of each class.

    With two classes that is on-line Newton; with more, the coupling of the classes is left out.
    """

    def _per_expert(self, columns: int) -> int:
        return columns

    def _proba(self, row: Array) -> Array:
        logits = np.zeros((len(self.coef), self.coef.shape[2] + 1))
        logits[:, :-1] = np.einsum("p,epc->ec", row, self.coef)
        return softmax_rows(logits)[1]

    def log_prob(self, row: Array, target: Array) -> Array:
        return np.log(np.maximum(self._proba(row) @ target, 1e-300))

    def learn(self, row: Array, target: Array, share: Array, weight: float, seen: int) -> None:
        proba, mass = self._proba(row)[:, :-1], weight * share
        curvature = mass[:, None] * np.maximum(proba * (1 - proba), 1e-3)  # a sure expert still slows down
        gain = self._gain(row, curvature, seen)  # [experts, classes - 1, p]
        self.coef += (mass[:, None, None] * gain * (target[:-1] - proba)[:, :, None]).swapaxes(1, 2)

    def params(self) -> Params:
        return {"coef": self.coef.swapaxes(1, 2).copy()}
