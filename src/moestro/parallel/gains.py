"""What each policy would have gained: decided from the first part of a history, measured on the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np

from moestro.parallel.loads import Load, load_shares, load_table
from moestro.parallel.placement import Placement
from moestro.parallel.policies import OF_THE_PAST, POLICIES, REPLICATING, Cluster
from moestro.parallel.predict import PREDICTORS


@dataclass(frozen=True)
class Gain:
    """What one policy does for one layer.

    Attributes:
        policy: its name.
        placement: what it chose.
        balancedness: mean over largest load of a rank, averaged over the steps that it had not seen; 1 = even.
        hindsight: the same when it decides from these steps themselves: what a perfect predictor would give.
        speedup: largest load of a rank with experts in order over that with the policy; how much faster the experts
            of the layer get where ranks wait for the busiest.
        busiest: largest load of a rank, as a share of all, averaged over those steps.
        load_per_rank: share of each rank, likewise.
        moved: experts that a rank must fetch, compared with experts in order.
    """

    policy: str
    placement: Placement
    balancedness: float
    hindsight: float
    speedup: float
    busiest: float
    load_per_rank: tuple[float, ...]
    moved: int


def policy_gains(
    history: Load,
    cluster: Cluster,
    *,
    predictor: str = "sliding-average",
    decide_at: float = 0.5,
    policies: Iterable[str] | None = None,
) -> list[Gain]:
    """What the policies would have gained in one layer, had they decided once.

    Args:
        history: loads of the layer, `[steps, experts]`.
        cluster: ranks and slots. Policies without replicas use one slot for each expert.
        predictor: of the loads to come, see `PREDICTORS`.
        decide_at: share of the history after which placements are decided.
        policies: names in `POLICIES`; None = all.

    Raises:
        ValueError: unknown names, a history too short to be split, or sizes that do not fit.
    """
    shares, tokens = load_shares(history), load_table(history).sum(1).mean()
    names = list(POLICIES if policies is None else policies)
    _known(names, POLICIES)
    _known([predictor], PREDICTORS)
    split = round(len(shares) * decide_at)
    if not 0 < split < len(shares):
        raise ValueError(f"{len(shares)} records cannot be split at {decide_at}: nothing would be left on one side")
    seen, later = shares[:split], shares[split:]
    forecast = PREDICTORS[predictor](seen, len(later))
    in_order = Placement.contiguous(shares.shape[1], cluster.ranks)
    base = _busiest(in_order, later).mean()
    gains = []
    for name in names:
        sizes = cluster if name in REPLICATING else replace(cluster, slots=None)
        before = Placement.in_turn(shares.shape[1], cluster.ranks, sizes.slots)
        placement = POLICIES[name](tokens * (seen if name in OF_THE_PAST else forecast), sizes, before)
        best = POLICIES[name](tokens * later, sizes, before)
        gains.append(
            Gain(
                name,
                placement,
                _balancedness(placement, later),
                _balancedness(best, later),
                float(base / _busiest(placement, later).mean()),
                float(_busiest(placement, later).mean()),
                tuple(placement.load_per_rank(later.mean(0).tolist())),
                _moved(in_order, placement),
            )
        )
    return gains


def _known(names: Iterable[str], table: Collection[str]) -> None:
    for name in names:
        if name not in table:
            raise ValueError(f"unknown {name!r}; there are {', '.join(table)}")


def _busiest(placement: Placement, loads: np.ndarray) -> np.ndarray:
    """The largest load of a rank in each step."""
    return np.array([max(placement.load_per_rank(load)) for load in loads])


def _balancedness(placement: Placement, loads: np.ndarray) -> float:
    return float(np.mean([placement.balancedness(load) for load in loads]))


def _moved(before: Placement, after: Placement) -> int:
    ranks = range(before.ranks)
    return sum(len(set(after.experts_of(rank)) - set(before.experts_of(rank))) for rank in ranks)
