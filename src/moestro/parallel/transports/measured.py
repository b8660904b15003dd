"""A dictionary of what was fastest: layouts and exchanges are tried out once for every size of load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moestro.parallel.network import Network, Trip
from moestro.parallel.search import lowest
from moestro.parallel.traffic import forward_phase
from moestro.parallel.transports.adaptive import Adaptive, degrees_of
from moestro.parallel.transports.base import TokenTransport, Transport, transport
from moestro.parallel.transports.linear import Linear
from moestro.parallel.transports.pipelined import Chunked
from moestro.parallel.transports.two_level import TwoLevel
from moestro.parallel.trials import trial_seconds

Key = tuple[int, int, int, int]
"""Whether gradients are recorded, size of the load, bytes of a row, bytes of a rank's experts."""


@dataclass(frozen=True)
class Choice:
    """What carries rows.

    Attributes:
        degree: r, see `Adaptive`.
        way: name of what carries rows between the ranks of `expert`; not used where r = 0.
    """

    degree: int
    way: str


def tutels_ways() -> dict[str, Transport]:
    """The plain exchange in 1, 2, 4 and 8 parts, and the one in two levels (Hwang et al. 2022)."""
    chunked = {f"linear in {parts}": Chunked(parts) for parts in (2, 4, 8)}
    return {"linear": Linear(), **chunked, "two-level": TwoLevel()}


@transport("measured")
class Measured(Transport):
    """The fastest degree r, number of parts and way of the exchange, measured when a size of load is first met.

        choices[floor(C / R)] = argmin over (r, way) of the seconds forward and backward
        C = the most rows that any rank has for one slot, R = `bucket`

    The adaptive parallelism and pipelining of Tutel (Hwang et al. 2022, section 3). For every way the degree is
    found by ternary search, as its cost falls and then rises; r = 0, where no rows travel, is measured once. A
    trial takes as long as its slowest rank, so that all ranks choose alike; layers of the same sizes share the
    dictionary, and passes without gradients have one of their own. From then on the choice is a look-up, at 8
    bytes for each other rank.

    A choice changes how sums are rounded. A checkpoint keeps the dictionary, so that a run that goes on repeats
    itself; two runs from the start may measure differently. Tutel pipelines the exchange in two levels too; here
    only the plain one has parts.

    Args:
        bucket: R, rows.
        repeats: trials of a candidate, of which the shortest counts.
        ways: transports of rows to try, by name; None = `tutels_ways`, two levels only where nodes have several
            ranks and there are several nodes.

    Raises:
        ValueError: a bucket or repeats below 1, no ways, or one that knows tokens; at build, experts that are not
            stacked in tensors `[experts, ...]`, or what one of the ways refuses.

    Attributes:
        choices: what was fastest, by key.
        seconds: of every candidate that was tried, by key.
        taken: how many calls took which choice, forward.
    """

    def __init__(self, bucket: int = 128, repeats: int = 3, ways: Mapping[str, Transport] | None = None) -> None:
        if min(bucket, repeats) < 1:
            raise ValueError(f"bucket={bucket} rows and repeats={repeats} must be at least 1")
        self.bucket, self.repeats = bucket, repeats
        self._given, self._ways = ways is not None, dict(tutels_ways() if ways is None else ways)
        if not self._ways or any(isinstance(way, TokenTransport) for way in self._ways.values()):
            raise ValueError(f"ways {', '.join(self._ways) or '(none)'}: pass transports of rows, e.g. 'linear'")
        self.choices: dict[Key, Choice] = {}
        self.seconds: dict[Key, dict[Choice, float]] = {}
        self.taken: Counter[Choice] = Counter()
        self._mesh = ""

    def check(self, network: Network, experts: nn.Module) -> None:
        self._mesh = network.mesh.shape.words
        for way in self._fitting(network).values():
            Adaptive(way).check(network, experts)

    def carry(self, trip: Trip, rows: Tensor, load: Tensor) -> Tensor:
        key = self._key(trip, rows, load)
        if key not in self.choices:
            self.choices[key] = self._fastest(key, trip, rows, load)
        choice = self.choices[key]
        if forward_phase() == "forward":
            self.taken[choice] += 1
        return self._made(choice).carry(trip, rows, load)

    def state(self) -> dict[str, Tensor]:
        names = list(self._ways)
        table = [[*key, choice.degree, names.index(choice.way)] for key, choice in self.choices.items()]
        return {f"choices of {self._sort}": torch.tensor(table, dtype=torch.int64).view(-1, 6)}

    def take(self, state: Mapping[str, Tensor]) -> None:
        names = list(self._ways)
        self.choices |= {
            (row[0], row[1], row[2], row[3]): Choice(row[4], names[row[5]])
            for row in state.get(f"choices of {self._sort}", torch.empty(0, 6)).tolist()
        }

    @property
    def _sort(self) -> str:
        """What two of them must share for the choices of one to mean something to the other."""
        return f"{self.bucket} rows, {', '.join(self._ways)}, {self._mesh}"

    def _key(self, trip: Trip, rows: Tensor, load: Tensor) -> Key:
        most = int(trip.network.highest(load.max().view(1)))
        row = rows.shape[1] * (trip.network.dtype or rows.dtype).itemsize
        weights = sum(p.numel() * p.element_size() for p in trip.parameters())
        return int(torch.is_grad_enabled()), most // self.bucket, row, weights

    def _fastest(self, key: Key, trip: Trip, rows: Tensor, load: Tensor) -> Choice:
        seconds: dict[Choice, float] = {}

        def tried(way: str, degree: int) -> float:
            choice = Choice(degree, way)
            seconds[choice] = trial_seconds(self._made(choice), trip, rows, load, self.repeats)
            return seconds[choice]

        degrees, ways = degrees_of(trip.network), list(self._fitting(trip.network))
        for way in ways:
            lowest([degree for degree in degrees if degree], partial(tried, way))
        if 0 in degrees:
            tried(ways[0], 0)
        self.seconds[key] = seconds
        return min(seconds, key=lambda choice: seconds[choice])

    def _made(self, choice: Choice) -> Adaptive:
        return Adaptive(self._ways[choice.way], choice.degree)

    def _fitting(self, network: Network) -> dict[str, Transport]:
        """The ways that can gain anything there."""
        levels = network.mesh.node is not None and 1 < network.node.size < network.expert.size
        return {name: way for name, way in self._ways.items() if self._given or levels or name != "two-level"}
