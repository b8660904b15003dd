"""What one MoE layer's step costs under a placement: products, rows on the wire, gradients of replicas."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moestro.parallel.placement import Placement


@dataclass(frozen=True)
class LayerCost:
    """Sizes of a layer and speeds of a machine.

        row_seconds    = 2 w / P                 forward products of one row
        wire_seconds   = d b / bandwidth         one row to another rank
        expert_seconds = w b / bandwidth         the parameters of one expert to another rank

    After He et al. 2022 (FasterMoE); defaults are theirs, of a V100 and a 50 Gbit/s network. A step costs a row
    three times its forward products, and four journeys: there and back, and the gradients of both.

    Attributes:
        width: numbers in a row, d.
        parameters: of one expert, w.
        number_bytes: bytes of a number on the wire, b.
        flops: products and sums that a rank does in a second, P.
        inside: bytes in a second between ranks of one node.
        between: bytes in a second between nodes.
    """

    width: int = 2048
    parameters: int = 2 * 2 * 2048 * 2048
    number_bytes: int = 4
    flops: float = 11.5e12
    inside: float = 50e9 / 8
    between: float = 50e9 / 8

    def __post_init__(self) -> None:
        sizes = (self.width, self.parameters, self.number_bytes, self.flops, self.inside, self.between)
        if min(sizes) <= 0:
            raise ValueError(f"sizes and speeds of a layer must be above 0, got {self}")

    @property
    def row_seconds(self) -> float:
        """Forward products of one row."""
        return 2 * self.parameters / self.flops

    @property
    def wire_seconds(self) -> float:
        """One row to another node."""
        return self.width * self.number_bytes / self.between

    @property
    def expert_seconds(self) -> float:
        """The parameters of one expert to another node."""
        return self.parameters * self.number_bytes / self.between

    def seconds(self, placement: Placement, load: Sequence[float], nodes: int = 1) -> float:
        """A training step: the busiest rank's products and rows, then the gradients of all replicas.

            T = max_g [3 row_seconds I_g + 4 sum_g' I_gg' d b / bandwidth_gg'] + sum_e sync_seconds(e)

        Nie et al. 2023 (FlexMoE), section 3. Every rank sends as many rows to an expert as any other.

        Args:
            placement: of one layer.
            load: tokens of each expert in a step, over all ranks.
            nodes: equal groups of consecutive ranks.
        """
        load_per_rank = placement.load_per_rank(load)
        sync = sum(self.sync_seconds(ranks, placement.ranks // nodes) for ranks in holders(placement))
        return self.seconds_per_row(placement.ranks, nodes) * max(load_per_rank) + sync

    def seconds_per_row(self, ranks: int, nodes: int = 1) -> float:
        """A training step of one row that comes from a rank taken by chance."""
        per_node = ranks // nodes
        near, far = (per_node - 1) / ranks, (ranks - per_node) / ranks
        journey = self.width * self.number_bytes * (near / self.inside + far / self.between)
        return 3 * self.row_seconds + 4 * journey

    def sync_seconds(self, ranks: Collection[int], per_node: int) -> float:
        """The ring all-reduce of an expert's gradient over the ranks that hold it; 0 for one rank."""
        slowest = self.inside if len({rank // per_node for rank in ranks}) == 1 else self.between
        return 2 * (len(ranks) - 1) / len(ranks) * self.parameters * self.number_bytes / slowest


def holders(placement: Placement) -> list[set[int]]:
    """The ranks that hold each expert."""
    found: list[set[int]] = [set() for _ in range(placement.num_experts)]
    for slot, expert in enumerate(placement.expert_of_slot):
        found[expert].add(slot // placement.slots_per_rank)
    return found
