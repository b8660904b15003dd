"""How even each placement policy keeps ranks under loads of several kinds, and what it moves for that.

    python benchmarks/placement.py [--picture docs/policies.png]

Counting, not timing: the same numbers on every machine. As in training, a policy sees the loads so far through the
sliding average, decides every 50 steps, and experts move where the busiest rank would else have 1.1 times the load.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moestro.parallel import POLICIES, PREDICTORS, Cluster, LayerCost, Placement
from moestro.parallel.moves import plan_moves
from moestro.parallel.policies import OF_THE_PAST, REPLICATING

EXPERTS, RANKS, SLOTS, TOKENS, STEPS, EVERY, GAIN = 32, 8, 40, 8192, 400, 50, 1.1
COST = LayerCost(width=1024, parameters=3 * 1024 * 512)
MOVED_BYTES = 3 * 4 * COST.parameters  # weights and AdamW's two moments


def even(chance: np.random.Generator) -> np.ndarray:
    """Every expert as likely as any other."""
    return np.full((STEPS, EXPERTS), 1 / EXPERTS)


def skewed(chance: np.random.Generator) -> np.ndarray:
    """The e-th most popular expert is 1/e as popular as the first (Zipf), and stays so."""
    weight = 1 / chance.permutation(np.arange(1, EXPERTS + 1))
    return np.tile(weight / weight.sum(), (STEPS, 1))


def hot(chance: np.random.Generator) -> np.ndarray:
    """One expert has a quarter of all tokens."""
    share = np.full(EXPERTS, 0.75 / (EXPERTS - 1))
    share[int(chance.integers(EXPERTS))] = 0.25
    return np.tile(share, (STEPS, 1))


def drifting(chance: np.random.Generator) -> np.ndarray:
    """Popularity wanders: a random walk of logarithms, from even to skewed."""
    walk = chance.normal(0, 0.1, (STEPS, EXPERTS)).cumsum(0)
    weight = np.exp(walk)
    return weight / weight.sum(1, keepdims=True)


LOADS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "even": even,
    "skewed": skewed,
    "one hot": hot,
    "drifting": drifting,
}


def run(policy: str, load: np.ndarray) -> tuple[list[float], int]:
    """Largest over mean load of a rank in every step after the first decision, and slots that came from afar."""
    slots = SLOTS if policy in REPLICATING else EXPERTS
    cluster = Cluster(RANKS, slots, nodes=2, cost=COST)
    placement, uneven, moved = Placement.in_turn(EXPERTS, RANKS, slots), [], 0
    for step in range(EVERY, STEPS + 1, EVERY):
        if step > EVERY:
            uneven += [1 / placement.balancedness(each) for each in load[step - EVERY : step].tolist()]
        seen = load[:step]
        forecast = PREDICTORS["sliding-average"](seen, EVERY) * TOKENS
        after = POLICIES[policy](seen if policy in OF_THE_PAST else forecast, cluster, placement)
        mean = forecast.mean(0).tolist()
        if max(placement.load_per_rank(mean)) >= GAIN * max(after.load_per_rank(mean)):
            per_rank = placement.slots_per_rank
            moved += sum(m.source // per_rank != m.target // per_rank for m in plan_moves(placement, after))
            placement = after
    return uneven, moved


def measure(seeds: int) -> dict[str, dict[str, tuple[float, float]]]:
    """By policy and kind of load: mean of largest over mean load, and GiB moved in a run."""
    found: dict[str, dict[str, tuple[float, float]]] = {policy: {} for policy in POLICIES}
    for name, make in LOADS.items():
        for policy in POLICIES:
            uneven, moved = list[float](), 0
            for seed in range(seeds):
                chance = np.random.default_rng(seed)
                counts = np.stack([chance.multinomial(TOKENS, share) for share in make(chance)])
                each, number = run(policy, counts)
                uneven, moved = uneven + each, moved + number
            found[policy][name] = float(np.mean(uneven)), moved / seeds * MOVED_BYTES / 2**30
    return found


def draw(found: dict[str, dict[str, tuple[float, float]]], path: Path) -> None:
    """Imbalance against bytes, one panel for each kind of load."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(LOADS), figsize=(13.5, 3.6), layout="constrained")
    markers = dict(zip(POLICIES, "oD^vsPX*", strict=True))
    for ax, name in zip(axes, LOADS, strict=True):
        for policy, row in found.items():
            style = {"markerfacecolor": "none"} if policy not in REPLICATING else {}
            ax.plot(row[name][1], row[name][0], markers[policy], markersize=9, label=policy, **style)
        ax.axhline(1, color="#8b8f98", linewidth=1, linestyle="--")
        ax.set_title(name)
        ax.set_xlabel("GiB moved")
        ax.margins(0.12)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("busiest rank / mean")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(POLICIES), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    words = parser.parse_args()
    found = measure(words.seeds)
    print(
        f"{EXPERTS} experts on {RANKS} ranks, {SLOTS} slots with replicas; largest / mean load, GiB moved in a run"
    )
    print("| policy | " + " | ".join(LOADS) + " |")
    print("|---|" + "---|" * len(LOADS))
    for policy, row in found.items():
        print(f"| `{policy}` | " + " | ".join(f"{row[n][0]:.3f}, {row[n][1]:.2f}" for n in LOADS) + " |")
    if words.picture:
        draw(found, words.picture)


if __name__ == "__main__":
    main()
