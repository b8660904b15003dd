"""What each way of restoring a part costs, and which is the cheapest that fits in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Units = tuple[float, float, float]
"""Loads of the three streams: products of rows with a matrix, rows on the wire, rows copied to a store or back."""


def units_of(strategy: str, middle: float = 4.0, again: float = 2.0) -> tuple[Units, Units]:
    """Loads of a part's forward and backward pass, in the units of one row of Zhang et al. 2023 (MPipeMoE).

    Args:
        strategy: `none` or `S1` to `S4`, see `moestro.parallel.restore.strategies`.
        middle: what experts keep for their gradients, in rows; H / M in the paper, with H = 4 M.
        again: products of computing again. The paper computes the first matrix only, 1; here experts run whole, 2.

    Raises:
        ValueError: an unknown strategy.
    """
    stored = {"none": 0.0, "S1": 1 + middle, "S2": middle, "S3": 1.0, "S4": 0.0}
    if strategy not in stored:
        raise ValueError(f"unknown strategy {strategy!r}; there are {', '.join(stored)}")
    products = 4 + again * (strategy in ("S3", "S4"))
    journeys = 2 + (strategy in ("S2", "S4"))
    return (2.0, 2.0, stored[strategy]), (products, float(journeys), stored[strategy])


@dataclass(frozen=True)
class Rates:
    """How long a layer takes for one row, and what of it stays.

    Attributes:
        product: seconds of one of the two products of a forward pass.
        wire: seconds of one journey.
        copy: seconds to a store, or back; infinite where there is none.
        row_bytes: of a row.
        middle_bytes: of what experts keep for its gradient.
    """

    product: float
    wire: float
    copy: float
    row_bytes: float
    middle_bytes: float

    def seconds(self, strategy: str, slower_wire: float = 1.0, slower_copy: float = 1.0) -> float:
        """Forward and backward pass of one row where the three streams run side by side.

            sum over both of max(products * product, journeys * wire / mu, copies * copy / eta)

        Args:
            strategy: its name.
            slower_wire: mu, the speed of the wire while experts compute, as a share of its own.
            slower_copy: eta, likewise of copies.
        """
        total = 0.0
        for products, journeys, copies in units_of(strategy, self.middle_bytes / self.row_bytes):
            copying = copies * self.copy / slower_copy if copies else 0.0
            total += max(products * self.product, journeys * self.wire / slower_wire, copying)
        return total

    def kept(self, strategy: str) -> float:
        """Bytes of one row that stay in memory between the passes: as it came, as it was sent, or nothing."""
        everything = self.row_bytes + self.middle_bytes
        return {"none": everything, "S1": 0.0, "S2": self.row_bytes, "S3": 0.0, "S4": self.row_bytes}[strategy]


def cheapest(rates: Rates, rows: int, strategies: Iterable[str], memory: int | None = None, *speeds: float) -> str:
    """The strategy of least seconds that keeps no more than so many bytes; of equals the first.

    Args:
        rates: of the layer.
        rows: of a call.
        strategies: names to choose among.
        memory: bytes that a call may keep between its passes; None = any number.
        speeds: `slower_wire` and `slower_copy`, see `Rates.seconds`.

    Raises:
        ValueError: none of them keeps so little.
    """
    names = list(strategies)
    fitting = [name for name in names if memory is None or rows * rates.kept(name) <= memory]
    if not fitting:
        least = min(names, key=rates.kept)
        raise ValueError(
            f"memory={memory} bytes: {rows} rows keep {rows * rates.kept(least):.0f} with {least}, the least of "
            f"{', '.join(names)}; allow more, or pass a store"
        )
    return min(fitting, key=lambda name: rates.seconds(name, *speeds))
