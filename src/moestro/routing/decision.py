"""Everything a router knows after deciding, for losses, controllers and inspection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from moestro.routing.merge import MergeRouting
from moestro.routing.soft import SoftRouting
from moestro.routing.sparse import SparseRouting

Routing = SparseRouting | SoftRouting | MergeRouting


@dataclass(frozen=True)
class Decision:
    """What a router decided and what it saw when deciding.

    Attributes:
        routing: who goes where; all that experts need.
        logits: scores before noise and gate, `[tokens, experts]`; None for routers that have none.
        probs: scores after the gate (they need not sum to 1: sigmoid), `[tokens, experts]` or None.
        notes: further facts, present when the router has them:
            `choice` `[tokens, k]` experts in order of preference, before any drop;
            `wanted` `[tokens, k]` bool, choices that the rule made, where k is only a bound (absent = all);
            `kept` `[tokens, k]` bool, choices that were carried out (absent = all);
            `valid` `[tokens]` bool, False for padding (absent = all valid);
            `sequence` `[tokens]` the sequence of each token (absent = one);
            `domain` `[tokens]` the domain of each token (absent = unknown);
            `device` `[tokens]` the device that each token lives on (absent = unknown);
            `noisy_logits` and `noise_std` `[tokens, experts]` of routers with noise on their logits;
            `shared_weight` `[tokens]` weight of the shared expert (absent = 1);
            `bias` `[experts]` added to the scores for selection only;
            `group` `[experts]` the group of each expert, where a router first chooses groups (absent = none).
    """

    routing: Routing
    logits: Tensor | None = None
    probs: Tensor | None = None
    notes: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
