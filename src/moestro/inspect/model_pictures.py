"""The pictures of a model's page: load against gate mass, coverage, pairs of experts, all layers at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moestro.inspect.pictures import DEAD, MOE, TWIN, Spec, by_depth, expert_tick, figure_spec


def every_layer(layers: Sequence[Mapping[str, Any]]) -> Spec:
    """Heat map layer × expert; colour is the load in units of the fair share, 1 in the middle."""
    import plotly.graph_objects as go

    most = max(len(layer["load"]) for layer in layers)
    rows = [
        [share * len(layer["load"]) for share in layer["load"]] + [None] * (most - len(layer["load"]))
        for layer in layers
    ]
    heat = go.Heatmap(
        x=list(range(most)),
        y=[layer["label"] for layer in layers],
        z=rows,
        coloraxis="coloraxis",
        hovertemplate="%{y}, expert %{x}: %{z:.2f} × fair share<extra></extra>",
    )
    spec = figure_spec(go.Figure(heat), "expert", "", max(170, min(110 + 26 * len(layers), 900)))
    ticks = {"tickvals": [0, 0.5, 1, 1.5, 2], "ticktext": ["0", "½×", "fair", "1½×", "≥ 2×"], "ticks": ""}
    spec["layout"]["coloraxis"] = {"cmin": 0, "cmax": 2, "colorbar": {"thickness": 8, "outlinewidth": 0, **ticks}}
    spec["layout"]["meta"] = {"scale": "diverging"}
    spec["layout"]["xaxis"] |= {"showgrid": False, "dtick": expert_tick(most)}
    spec["layout"]["yaxis"] |= {"showgrid": False, "autorange": "reversed", "type": "category"}
    return spec


def load_and_mass(layer: Mapping[str, Any]) -> Spec:
    """Bars of every expert's load, never-routed and dead ones in red; a dot is its gate mass."""
    import plotly.graph_objects as go

    count, dead = len(layer["load"]), set(layer["dead"])
    experts = list(range(count))
    figure = go.Figure(
        go.Bar(
            x=experts,
            y=[100 * share for share in layer["load"]],
            name="load",
            marker={"color": [DEAD if expert in dead else MOE for expert in experts]},
            hovertemplate="expert %{x}: %{y:.2f} % of the choices<extra></extra>",
        )
    )
    if layer["gate_mass"] is not None:
        figure.add_scatter(
            x=experts,
            y=[100 * share for share in layer["gate_mass"]],
            name="gate mass",
            mode="markers",
            marker={"color": TWIN, "size": 7 if count <= 64 else 4},
            hovertemplate="expert %{x}: %{y:.2f} % of the probability<extra></extra>",
        )
    figure.add_hline(y=100 / count, line={"dash": "dash", "width": 1.5, "color": "#8b8f98"})
    spec = figure_spec(figure, "expert", "%", 230)
    spec["layout"]["xaxis"] |= {"dtick": expert_tick(count), "showgrid": False, "range": [-0.6, count - 0.4]}
    spec["layout"]["yaxis"]["rangemode"] = "tozero"
    spec["layout"] |= {"bargap": 0.18, "margin": spec["layout"]["margin"] | {"t": 30}}
    return spec


def coverage_curves(layers: Sequence[Mapping[str, Any]]) -> Spec:
    """The share of the choices that the N busiest experts serve, a line per layer."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for layer, colour in zip(layers, by_depth(len(layers)), strict=True):
        figure.add_scatter(
            x=list(range(1, len(layer["coverage"]) + 1)),
            y=[100 * share for share in layer["coverage"]],
            name=layer["label"],
            line={"color": colour, "width": 2},
            hovertemplate="%{x} busiest: %{y:.1f} %<extra>" + layer["label"] + "</extra>",
        )
    most = max(len(layer["coverage"]) for layer in layers)
    even = [100 * n / most for n in range(1, most + 1)]
    figure.add_scatter(
        x=list(range(1, most + 1)),
        y=even,
        name="even load",
        line={"color": "#8b8f98", "width": 1.2, "dash": "dash"},
        hoverinfo="skip",
    )
    spec = figure_spec(figure, "busiest experts", "% of the choices", 320)
    spec["layout"]["yaxis"]["range"] = [0, 103]
    spec["layout"]["showlegend"] = len(layers) <= 8
    return spec


def pair_map(
    experts: Sequence[int],
    matrix: Sequence[Sequence[float]],
    most: float,
    middle: float,
    labels: Mapping[float, str] | None = None,
) -> Spec:
    """Heat map expert × expert, the diagonal left blank.

    Args:
        experts: their numbers.
        matrix: a value per pair.
        most: the value of the darkest blue.
        middle: the value of the faintest colour; the darkest orange lies as far below it as `most` above.
        labels: of the colour bar, by value.
    """
    import plotly.graph_objects as go

    names = [str(expert) for expert in experts]
    cells = [[None if a == b else value for b, value in enumerate(row)] for a, row in enumerate(matrix)]
    heat = go.Heatmap(
        x=names, y=names, z=cells, coloraxis="coloraxis", hovertemplate="%{y} and %{x}: %{z:.2f}<extra></extra>"
    )
    spec = figure_spec(go.Figure(heat), "expert", "expert", 330)
    bar: dict[str, Any] = {"thickness": 8, "outlinewidth": 0}
    if labels is not None:
        bar |= {"tickvals": list(labels), "ticktext": list(labels.values()), "ticks": ""}
    spec["layout"]["coloraxis"] = {"cmin": 2 * middle - most, "cmax": most, "colorbar": bar}
    spec["layout"]["meta"] = {"scale": "diverging"}
    axis = {"type": "category", "showgrid": False, "ticks": "", "dtick": expert_tick(len(names))}
    spec["layout"]["xaxis"] |= axis
    spec["layout"]["yaxis"] |= axis | {"autorange": "reversed"}
    return spec
