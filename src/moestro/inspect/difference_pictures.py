"""The pictures of a comparison: agreement by layer, and heat maps layer by expert of what moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moestro.inspect.pictures import MOE, TWIN, Spec, expert_tick, figure_spec


def agreement(layers: Sequence[Mapping[str, Any]]) -> Spec | None:
    """Bars of the agreement of each layer's choices, a dot where blind choices would be."""
    import plotly.graph_objects as go

    if not layers:
        return None
    labels = [layer["label"] for layer in layers]
    figure = go.Figure(
        go.Bar(
            x=labels,
            y=[100 * layer["agreement"] for layer in layers],
            name="agreement",
            marker={"color": MOE},
            hovertemplate="%{x}: %{y:.1f} % agree<extra></extra>",
        )
    )
    figure.add_scatter(
        x=labels,
        y=[100 * layer["blind"] for layer in layers],
        name="blind choices",
        mode="markers",
        marker={"color": TWIN, "size": 9},
        hovertemplate="%{x}: %{y:.1f} % by chance<extra></extra>",
    )
    spec = figure_spec(figure, "", "%", 280)
    spec["layout"]["xaxis"] |= {"type": "category", "showgrid": False, "dtick": expert_tick(len(labels), 8)}
    spec["layout"]["yaxis"]["range"] = [0, 103]
    spec["layout"] |= {"bargap": 0.3, "margin": spec["layout"]["margin"] | {"t": 30}}
    return spec


def load_change(layers: Sequence[Mapping[str, Any]]) -> Spec | None:
    """Heat map layer × expert: load in B less load in A, in units of the fair share."""
    if not layers:
        return None
    rows = [
        [len(layer["load_a"]) * (b - a) for a, b in zip(layer["load_a"], layer["load_b"], strict=True)]
        for layer in layers
    ]
    most = max(max(abs(value) for row in rows for value in row), 0.01)
    spec = _map(layers, rows, "%{y}, expert %{x}: %{z:+.2f} × the fair share<extra></extra>")
    spec["layout"]["coloraxis"] = {"cmin": -most, "cmax": most, "colorbar": _bar()}
    spec["layout"]["meta"] = {"scale": "diverging"}
    return spec


def distances(layers: Sequence[Mapping[str, Any]], part: str, key: str) -> Spec | None:
    """Heat map layer × expert of relative distances, in percent."""
    if not layers:
        return None
    rows = [[None if value is None else 100 * value for value in layer[part][key]] for layer in layers]
    most = max((value for row in rows for value in row if value is not None), default=0.0) or 0.01
    spec = _map(layers, rows, "%{y}, expert %{x}: moved by %{z:.3g} %<extra></extra>")
    spec["layout"]["coloraxis"] = {"cmin": 0, "cmax": most, "colorbar": _bar(" %")}
    spec["layout"]["meta"] = {"scale": "sequential"}
    return spec


def _map(layers: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[float | None]], hover: str) -> Spec:
    import plotly.graph_objects as go

    most = max(map(len, rows))
    cells = [[*row, *[None] * (most - len(row))] for row in rows]
    heat = go.Heatmap(
        x=list(range(most)),
        y=[layer["label"] for layer in layers],
        z=cells,
        coloraxis="coloraxis",
        hovertemplate=hover,
    )
    spec = figure_spec(go.Figure(heat), "expert", "", max(170, min(110 + 26 * len(layers), 900)))
    spec["layout"]["xaxis"] |= {"showgrid": False, "dtick": expert_tick(most)}
    spec["layout"]["yaxis"] |= {"showgrid": False, "autorange": "reversed", "type": "category"}
    return spec


def _bar(suffix: str = "") -> dict[str, Any]:
    return {"thickness": 8, "outlinewidth": 0, "ticks": "", "ticksuffix": suffix, "nticks": 5}
