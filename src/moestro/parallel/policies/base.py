"""What a placement policy is: from what experts had to do lately to who shall hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from moestro.parallel.costs import LayerCost
from moestro.parallel.loads import Load
from moestro.parallel.placement import Placement


@dataclass(frozen=True)
class Cluster:
    """What experts are spread over.

    Attributes:
        ranks: processes that hold experts.
        slots: physical experts on all ranks; None = one for each expert.
        nodes: machines with equal numbers of ranks.
        groups: equal groups of consecutive experts that tokens choose among (node-limited routing).
        cost: what a step costs; only policies that weigh a gain against its price look at it.
    """

    ranks: int
    slots: int | None = None
    nodes: int = 1
    groups: int = 1
    cost: LayerCost = field(default_factory=LayerCost)


class Policy(Protocol):
    """Places the experts of one layer."""

    def __call__(self, history: Load, cluster: Cluster, current: Placement | None = None) -> Placement:
        """A placement for loads like these.

        Args:
            history: what experts had to do, or will have, `[steps, experts]`: tokens, or shares where the policy
                only compares experts.
            cluster: where they go.
            current: where they are; None = nowhere yet.

        Raises:
            ValueError: sizes that do not fit.
        """
