"""Pictures of a fitted mixture of experts. Needs matplotlib, imported when a picture is drawn.

Every function draws into the given axes, or into new ones, and returns them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.mixtures.numerics import Array


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6, 4), layout="constrained")[1]


def _colors(num: int) -> Array:
    import matplotlib as mpl

    return mpl.colormaps["viridis"](np.linspace(0, 0.85, num))


def _grid(model: Any, X: Any, feature: int) -> tuple[Array, Array]:
    """A line through the medians of the inputs along one of them, slightly longer than the data."""
    x = np.asarray(X, dtype=np.float64)
    low, high = x[:, feature].min(), x[:, feature].max()
    line = np.linspace(low - 0.03 * (high - low), high + 0.03 * (high - low), 300)
    grid = np.tile(np.median(x, axis=0), (300, 1))
    grid[:, feature] = line
    return line, grid


def plot_gates(model: Any, X: Any, feature: int = 0, ax: Any = None) -> Any:
    """Gate probabilities over one input, the other inputs at their medians."""
    ax = _axes(ax)
    line, grid = _grid(model, X, feature)
    share = model.gate_proba(grid)
    for i, color in enumerate(_colors(share.shape[1])):
        ax.plot(line, share[:, i], color=color, label=f"expert {i}")
    ax.set(xlabel=f"input {feature}", ylabel="gate probability", ylim=(-0.02, 1.02))
    ax.legend(frameon=False)
    return ax


def plot_experts(
    model: Any, X: Any, y: Any, feature: int = 0, output: int = 0, coverage: float = 0.9, ax: Any = None
) -> Any:
    """Rows coloured by their most probable expert, each expert's mean, and the mixture with an interval.

    An expert's line is solid where the gate gives it at least a tenth.
    """
    ax = _axes(ax)
    line, grid = _grid(model, X, feature)
    target = np.asarray(y, dtype=np.float64).reshape(len(y), -1)[:, output]
    means, share = model.predict_experts(grid)[:, :, output], model.gate_proba(grid)
    colors = _colors(share.shape[1])
    alpha = float(np.clip(300 / len(target), 0.2, 0.6))  # crowds stay readable
    ax.scatter(np.asarray(X)[:, feature], target, c=colors[model.assign(X, y)], s=8, alpha=alpha, linewidths=0)
    bounds = [np.asarray(side).reshape(len(grid), -1)[:, output] for side in model.predict_interval(grid, coverage)]
    ax.fill_between(line, *bounds, color="0.5", alpha=0.2, linewidth=0, label=f"{coverage:.0%} interval")
    span = target.max() - target.min()
    for i, color in enumerate(colors):
        shown = np.where(
            np.abs(means[:, i] - np.clip(means[:, i], target.min(), target.max())) < span, means[:, i], np.nan
        )
        ax.plot(line, shown, color=color, linestyle=":", linewidth=1)
        ax.plot(line, np.where(share[:, i] >= 0.1, shown, np.nan), color=color, linewidth=3, label=f"expert {i}")
    mean = np.asarray(model.predict(grid)).reshape(len(grid), -1)[:, output]
    ax.plot(line, mean, color="black", linewidth=1.2, label="mixture")
    ax.set(xlabel=f"input {feature}", ylabel="target")
    ax.set_ylim(target.min() - 0.15 * span, target.max() + 0.15 * span)
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_responsibilities(model: Any, X: Any, y: Any, feature: int = 0, ax: Any = None) -> Any:
    """Posterior probabilities of the experts for every row, over one input."""
    ax = _axes(ax)
    share = model.responsibilities(X, y)
    for i, color in enumerate(_colors(share.shape[1])):
        ax.scatter(np.asarray(X)[:, feature], share[:, i], color=color, s=8, alpha=0.6, label=f"expert {i}")
    ax.set(xlabel=f"input {feature}", ylabel="responsibility", ylim=(-0.03, 1.03))
    ax.legend(frameon=False)
    return ax


def plot_log_likelihood(model: Any, ax: Any = None) -> Any:
    """The monitored objective over the iterations of the best start."""
    ax = _axes(ax)
    ax.plot(model.loglik_path_, color="black", marker=".", markersize=4)
    ax.set(xlabel="iteration", ylabel="penalised log-likelihood")
    ax.locator_params(axis="x", integer=True)
    return ax


def plot_tree(model: Any, X: Any, ax: Any = None) -> Any:
    """The tree of gates: width of an edge and number at a node are the mean probability of passing there."""
    ax = _axes(ax)
    levels = model.node_proba(X)
    num_leaves = model.gate_proba(X).shape[1]
    reach = np.ones((len(X), 1))
    place = [np.array([0.5])]
    ax.text(
        0.5,
        0.0,
        "1.00",
        ha="center",
        va="center",
        fontsize="small",
        bbox={"boxstyle": "round", "fc": "white", "ec": "0.4"},
        zorder=3,
    )
    for depth, level in enumerate(levels):
        reach = (reach[:, :, None] * level).reshape(len(X), -1)
        spots = (np.arange(reach.shape[1]) + 0.5) / reach.shape[1]
        for child, (spot, mass) in enumerate(zip(spots, reach.mean(0), strict=True)):
            parent = place[-1][child // level.shape[2]]
            ax.plot(
                [parent, spot], [-depth, -depth - 1], color="0.6", linewidth=0.5 + 8 * mass, solid_capstyle="round"
            )
            leaf = depth == len(levels) - 1
            label = f"expert {child}\n{mass:.2f}" if leaf else f"{mass:.2f}"
            face = 1 - 0.4 * (1 - _colors(num_leaves)[child]) if leaf else "white"
            ax.text(
                spot,
                -depth - 1,
                label,
                ha="center",
                va="center",
                fontsize="small",
                bbox={"boxstyle": "round", "fc": face, "ec": "0.4"},
                zorder=3,
            )
        place.append(spots)
    ax.set(xlim=(0, 1), ylim=(-len(levels) - 0.5, 0.5))
    ax.axis("off")
    return ax
