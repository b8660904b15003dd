"""Policies that decide which rank holds which expert, behind one contract; see `Policy`."""

from moestro.parallel.policies.base import Cluster, Policy
from moestro.parallel.policies.exflow import exflow, moving_share, pair_counts
from moestro.parallel.policies.flexmoe import flexmoe
from moestro.parallel.policies.plain import anti_correlation, contiguous, everywhere, greedy, hierarchical
from moestro.parallel.policies.refine import exchanged, refined
from moestro.parallel.policies.smartmoe import Pool, best_placement, layout_pools, smartmoe

POLICIES: dict[str, Policy] = {
    "contiguous": contiguous,
    "greedy": greedy,
    "anti-correlation": anti_correlation,
    "smartmoe": smartmoe,
    "eplb": hierarchical,
    "eplb-global": everywhere,
    "flexmoe": flexmoe,
    "refined": refined,
}
REPLICATING = {"eplb", "eplb-global", "flexmoe", "refined"}  # the others hold every expert once
WEIGHING = {"flexmoe"}  # a gain against its price, in seconds of a machine; the others only compare loads
OF_THE_PAST = {"anti-correlation"}  # sees what happened: a forecast is as smooth as its predictor

__all__ = [
    "OF_THE_PAST",
    "POLICIES",
    "REPLICATING",
    "WEIGHING",
    "Cluster",
    "Policy",
    "Pool",
    "anti_correlation",
    "best_placement",
    "contiguous",
    "everywhere",
    "exchanged",
    "exflow",
    "flexmoe",
    "greedy",
    "hierarchical",
    "layout_pools",
    "moving_share",
    "pair_counts",
    "refined",
    "smartmoe",
]
