"""Exchanges in as many parts as are fastest for their rows, of which as little stays as fits in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moestro.parallel.intervals import Interval, Intervals
from moestro.parallel.network import Network, Trip
from moestro.parallel.restore import Store, keep, strategies
from moestro.parallel.strategy_costs import Rates, cheapest
from moestro.parallel.traffic import forward_phase
from moestro.parallel.transports.base import Transport, transport
from moestro.parallel.transports.pipelined import Chunked
from moestro.parallel.trials import rates_of, trial_seconds

Key = tuple[int, int, int]
"""Whether gradients are recorded, bytes of a row, bytes of a rank's experts."""


@transport("granular")
class Granular(Transport):
    """As many chunks as are fastest for so many rows, restored in the cheapest way that fits (Zhang et al. 2023).

        parts    = those of the interval in which B lies, else measured, see `Intervals`
        strategy = argmin seconds(s) over s that keep at most `memory` bytes, see `Rates`

    where B = rows of the rank that has most. MPipeMoE's adaptive granularity and memory reuse. Without a limit
    everything is kept; with one the speeds of experts, wire and store are measured, once for layers of the same
    sizes. Every figure is that of the slowest rank, so that all ranks choose alike. Passes without gradients keep
    nothing and have intervals of their own.

    Both choices change nothing but rounding. A checkpoint keeps intervals and speeds, so that a run that goes on
    repeats itself; two runs from the start may measure differently.

    Args:
        parts: numbers of parts to choose among.
        memory: bytes that a call may keep of its parts between its passes, on each rank; None = any number.
        store: where strategies S1 to S3 offload to, see `moestro.parallel.restore`; None = `none` and S4 only.
        slower_wire: speed of the wire while experts compute, as a share of its own.
        slower_copy: likewise of copies to the store.
        repeats: trials of a number of parts, of which the shortest counts.

    Raises:
        ValueError: parts or repeats below 1, no parts, speeds that are no shares; at run, more rows than fit.

    Attributes:
        intervals: of every sort of layer, by key.
        rates: measured speeds, by key.
        taken: how many calls had how many parts and which strategy, forward.
    """

    def __init__(
        self,
        parts: Sequence[int] = (1, 2, 4, 8),
        memory: int | None = None,
        store: Store | None = None,
        slower_wire: float = 1.0,
        slower_copy: float = 1.0,
        repeats: int = 3,
    ) -> None:
        if not parts or min(*parts, repeats) < 1:
            raise ValueError(f"parts={list(parts)} and repeats={repeats} must be numbers of at least 1")
        if not 0 < min(slower_wire, slower_copy) <= max(slower_wire, slower_copy) <= 1:
            raise ValueError(f"slower_wire={slower_wire} and slower_copy={slower_copy} must be shares, up to 1")
        self.parts, self.memory, self.store, self.repeats = sorted(set(parts)), memory, store, repeats
        self.speeds = slower_wire, slower_copy
        self.intervals: dict[Key, Intervals] = {}
        self.rates: dict[Key, Rates] = {}
        self.taken: Counter[tuple[int, str]] = Counter()
        self._mesh, self._restores = "", strategies(store or keep)

    def check(self, network: Network, experts: nn.Module) -> None:
        self._mesh = network.mesh.shape.words

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        most = int(trip.network.highest(load.sum().view(1)))
        row = rows.shape[1] * rows.element_size()
        weights = sum(p.numel() * p.element_size() for p in trip.parameters())
        key = int(torch.is_grad_enabled()), row, weights
        strategy = self._strategy(key, trip, rows, most) if torch.is_grad_enabled() else "none"
        restore = self._restores[strategy]

        def tried(parts: int) -> float:
            return trial_seconds(Chunked(parts, restore), trip, rows, load, self.repeats)

        parts = self.intervals.setdefault(key, Intervals()).parts_for(most, self.parts, tried)
        if forward_phase() == "forward":
            self.taken[parts, strategy] += 1
        return Chunked(parts, restore).carry(trip, rows, load)

    def state(self) -> dict[str, Tensor]:
        intervals = [[*key, *each] for key, table in self.intervals.items() for each in table.found]
        rates = [[*key, *vars(each).values()] for key, each in self.rates.items()]
        return {
            f"intervals of {self._sort}": torch.tensor(intervals, dtype=torch.int64).view(-1, 6),
            f"rates of {self._sort}": torch.tensor(rates, dtype=torch.float64).view(-1, 8),
        }

    def take(self, state: Mapping[str, Tensor]) -> None:
        found: dict[Key, list[Interval]] = {}
        for one, row, weights, *interval in state.get(f"intervals of {self._sort}", torch.empty(0, 6)).tolist():
            found.setdefault((one, row, weights), []).append(Interval(*interval))
        self.intervals |= {key: Intervals(each) for key, each in found.items()}
        for one, row, weights, *rates in state.get(f"rates of {self._sort}", torch.empty(0, 8)).tolist():
            self.rates[int(one), int(row), int(weights)] = Rates(*rates)

    @property
    def _sort(self) -> str:
        """What two of them must share for the figures of one to mean something to the other."""
        return f"{' '.join(map(str, self.parts))} parts, {self._mesh}"

    def _strategy(self, key: Key, trip: Trip, rows: Tensor, most: int) -> str:
        """The cheapest strategy for the rank of most rows; speeds are measured where they are needed first."""
        if self.memory is None or not most:
            return "none"  # which has the least to do
        if key not in self.rates:
            self.rates[key] = rates_of(trip, rows, most, self.store)
        names = [name for name in self._restores if self.store is not None or name in ("none", "S4")]
        if trip.network.mesh.shape.tensor > 1:
            names = [name for name in names if name != "S2"]  # see `Pipelined`
        return cheapest(self.rates[key], most, names, self.memory, *self.speeds)
