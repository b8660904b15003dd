"""The load of every rank with experts in order and after a policy, one panel per layer. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moestro.inspect.placement import RunPlacements
from moestro.parallel import Gain

BEFORE, AFTER, EVEN = "#c2c7d0", "#2f6f8f", "#b3541e"


def draw_placements(found: RunPlacements, policy: str, path: Path, columns: int = 4) -> Path:
    """Draw the load per rank, relative to an even one, before and after a policy; the mean of the measured steps.

    Args:
        found: of a run, with the policy "contiguous" in it.
        policy: name of the other.
        path: .png, .svg or .pdf.
        columns: most panels side by side.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: a policy that was not tried.
    """
    import matplotlib as mpl

    mpl.use("Agg", force=False)
    import matplotlib.pyplot as plt

    layers = {label: {gain.policy: gain for gain in gains} for label, gains in found.layers.items()}
    tried = next(iter(layers.values()))
    for name in ("contiguous", policy):
        if name not in tried:
            raise ValueError(f"policy {name!r} was not tried; there are {', '.join(tried)}")
    columns = min(columns, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.9 * columns + 0.4, 2.5 * rows + 0.7),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[len(layers) :]:
        ax.set_axis_off()
    for ax, (label, gains) in zip(axes.flat, layers.items(), strict=False):
        _panel(ax, label, gains["contiguous"], gains[policy])
    for row in axes:
        row[0].set_ylabel("load / even load")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _panel(ax: Any, label: str, before: Gain, after: Gain) -> None:
    ranks = range(len(before.load_per_rank))
    for gain, color, place in ((before, BEFORE, -0.2), (after, AFTER, 0.2)):
        even = sum(gain.load_per_rank) / len(gain.load_per_rank)
        heights = [load / even for load in gain.load_per_rank]
        title = "experts in order" if gain is before else gain.policy
        ax.bar([rank + place for rank in ranks], heights, width=0.38, color=color, label=title)
    ax.axhline(1, color=EVEN, linewidth=1, label="even")
    ax.set_title(f"{label}: {before.balancedness:.2f} to {after.balancedness:.2f}", fontsize=10)
    ax.set_xticks(list(ranks), [f"rank {rank}" for rank in ranks], fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
