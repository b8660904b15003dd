"""What a gate is: it says, for every row, how likely each expert is before the target is seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from sklearn.base import BaseEstimator

from moestro.mixtures.numerics import Array, softmax_rows
from moestro.mixtures.rows import Rows, Scaling, with_intercept

Params = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How hard an M-step tries: most inner steps, the solver of softmax problems, the gain below which to stop."""

    steps: int = 5
    solver: str = "newton"
    enough: float = 0.0


class Gate(BaseEstimator, ABC):
    """A kind of gate with its options; the fitted numbers travel beside it as a dict of arrays.

    A *generative* gate models the inputs too: `log_weight` is then the joint log-density of expert and input,
    and EM raises the likelihood of inputs and targets together.
    """

    generative = False
    hierarchical = False  # whether the gate can be a tree
    climbs = True  # EM never lowers the objective
    parametric = True  # finitely many free numbers: `free`, `restore` and `gradient` answer

    def design(self, x: Array, scaling: Scaling) -> Array:
        """Gate features `[rows, gate features]` of inputs in the user's units."""
        return with_intercept(scaling.x(x))

    def log_volume(self, scaling: Scaling) -> float:
        """What the log-density of a generative gate's features is too large by, in the user's units."""
        return 0.0

    @abstractmethod
    def start(self, rows: Rows, share: Array, branching: tuple[int, ...], effort: Effort) -> Params:
        """First parameters from soft labels `[rows, experts]`."""

    @abstractmethod
    def m_step(self, rows: Rows, share: Array, params: Params, effort: Effort) -> Params:
        """Parameters that explain the posterior shares at least as well as the present ones."""

    @abstractmethod
    def log_weight(self, params: Params, u: Array) -> Array:
        """`log g_i(x)`, or `log g_i + log p(x | i)` of a generative gate. Shapes: `[rows, experts]`."""

    def log_proba(self, params: Params, u: Array) -> Array:
        """`log g_i(x)`, rows that sum to one in probability. Shapes: `[rows, experts]`."""
        weight = self.log_weight(params, u)
        return weight - softmax_rows(weight)[0][:, None] if self.generative else weight

    def penalty(self, params: Params, rows: Rows) -> float:
        """What the monitored objective loses to the gate's prior."""
        return 0.0

    @abstractmethod
    def count(self, params: Params) -> int:
        """Free parameters."""

    @abstractmethod
    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        """Fitted attributes in the user's units, by name."""

    def free(self, params: Params) -> Array:
        """The parameters as unconstrained numbers."""
        raise self._no_numbers()

    def restore(self, numbers: Array, like: Params) -> Params:
        """Inverse of `free`."""
        raise self._no_numbers()

    def gradient(self, rows: Rows, share: Array, params: Params) -> Array:
        """Gradient of `sum_t w_t sum_i share_ti log_weight_ti - penalty` in the free numbers."""
        raise self._no_numbers()

    def _no_numbers(self) -> ValueError:
        assert not self.parametric
        return ValueError(f"{self!r} has no finite set of free numbers; pass another gate or method='bootstrap'")

    @abstractmethod
    def permute(self, params: Params, order: Array) -> Params:
        """The same gate with experts renumbered: new expert j is old expert `order[j]`."""
