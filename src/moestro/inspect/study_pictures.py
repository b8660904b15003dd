"""The pictures of a study, as plotly figures turned into plain JSON; plotly is imported where it is used."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from moestro.inspect.pictures import DEAD, MOE, TWIN, Spec, figure_spec

GREY, GOOD = "#8b8f98", "#2a9d8f"
_BEST = ("#3d7cc9", "#2a9d8f", "#7b61c9", "#c2508f", "#4a8f2a")
Row = Mapping[str, Any]


def curves(rows: Sequence[Row]) -> Spec:
    """Validation bits per byte over the steps: the best five in colour, dense in orange, the rest grey."""
    import plotly.graph_objects as go

    figure = go.Figure()
    best = [row["label"] for row in rows if row["method"] is not None][: len(_BEST)]
    for row in sorted(rows, key=lambda row: (row["method"] is None, row["label"] in best)):
        label, dense = row["label"], row["method"] is None
        known = dense or label in best
        colour = TWIN if dense else _BEST[best.index(label)] if label in best else GREY
        figure.add_scatter(
            x=row["curve"]["steps"],
            y=row["curve"]["bits_per_byte"],
            name=html.escape(label),
            showlegend=known,
            opacity=1.0 if known else 0.35,
            line={"color": colour, "width": 2.6 if dense else 2 if known else 1},
            mode="lines+markers" if len(row["curve"]["steps"]) == 1 else "lines",
            hovertemplate="step %{x}: %{y:.4f}<extra>" + html.escape(label) + "</extra>",
        )
    spec = figure_spec(figure, "step", "validation bits per byte", 420)
    spec["layout"]["xaxis"]["rangemode"] = "tozero"
    return spec


def differences(rows: Sequence[Row]) -> Spec:
    """Difference to the dense model with 95 % intervals, best at the top; grey where it is within noise."""
    import plotly.graph_objects as go

    compared = [row for row in rows if row["difference"]][::-1]  # plotly draws upwards
    figure = go.Figure()
    figure.add_vline(x=0, line={"dash": "dash", "width": 1.2, "color": TWIN})
    for name, colour, wanted in (("better", GOOD, -1), ("within noise", GREY, 0), ("worse", DEAD, 1)):
        group = [row for row in compared if _side(row) == wanted]
        figure.add_scatter(
            x=[row["difference"]["mean"] for row in group],
            y=[html.escape(row["label"]) for row in group],
            error_x={
                "array": [row["difference"]["half_width"] or 0 for row in group],
                "thickness": 1.4,
                "width": 0,
            },
            mode="markers",
            marker={"color": colour, "size": 7},
            name=name,
            hovertemplate="%{y}: %{x:+.4f}<extra></extra>",
        )
    spec = figure_spec(figure, "bits per byte, minus those of the dense model", "", 90 + 19 * len(compared))
    order = [html.escape(row["label"]) for row in compared]
    spec["layout"]["yaxis"] |= {"type": "category", "categoryarray": order, "categoryorder": "array", "dtick": 1}
    means = sorted(row["difference"]["mean"] for row in compared)
    low, high = means[0], means[min(len(means) - 1, round(0.95 * len(means)))]
    room = 0.15 * (high - low) or 0.05
    left, right = min(low - room, -room), max(high + room, room)
    spec["layout"]["xaxis"]["range"] = [left, right]
    spec["layout"]["annotations"] = [
        {"x": right, "y": html.escape(row["label"]), "text": f"{row['difference']['mean']:+.2f} →"}
        | {"xanchor": "right", "showarrow": False, "font": {"size": 11, "color": DEAD}}
        for row in compared
        if row["difference"]["mean"] > right
    ]
    return spec


def trade(rows: Sequence[Row]) -> Spec:
    """Speed in training against bits per byte, one dot per method; a dot in a crowd has its name on hover only."""
    import plotly.graph_objects as go

    known = [row for row in rows if row["speed"]]
    named = _named({row["label"]: (row["speed"]["relative"], row["bits_per_byte"]["mean"]) for row in known})
    figure = go.Figure()
    figure.add_scatter(
        x=[row["speed"]["relative"] for row in known],
        y=[row["bits_per_byte"]["mean"] for row in known],
        text=[html.escape(row["label"]) if row["label"] in named else "" for row in known],
        customdata=[html.escape(row["label"]) for row in known],
        mode="markers+text",
        textposition="top center",
        textfont={"size": 10},
        marker={"color": MOE, "size": 7},
        showlegend=False,
        hovertemplate="%{customdata}: %{y:.4f} at %{x:.2f} of the dense speed<extra></extra>",
    )
    dense = next((row for row in rows if row["method"] is None), None)
    if dense is not None:
        figure.add_hline(y=dense["bits_per_byte"]["mean"], line={"dash": "dash", "width": 1.2, "color": TWIN})
    spec = figure_spec(figure, "tokens per second relative to the dense model", "bits per byte", 460)
    values = sorted(row["bits_per_byte"]["mean"] for row in rows)
    high = values[min(len(values) - 1, round(0.95 * len(values)))]
    room = 0.12 * (high - values[0]) or 0.05
    spec["layout"]["yaxis"]["range"] = [values[0] - room, high + room]
    return spec


def _named(dots: Mapping[str, tuple[float, float]]) -> set[str]:
    """The labels that can stand above their dots without touching: of unbeaten ones first, then of outer ones.

    Args:
        dots: label -> (speed, bits per byte).
    """

    def beaten(label: str) -> bool:
        speed, bits = dots[label]
        return any(x >= speed and y <= bits and (x, y) != (speed, bits) for x, y in dots.values())

    def crowd(label: str) -> int:
        (x, y) = dots[label]
        return sum(abs(x - at) < 0.1 * wide and abs(y - height) < 0.1 * tall for at, height in dots.values())

    speeds, bits = zip(*dots.values(), strict=True) if dots else ((0.0,), (0.0,))
    wide, tall = max(speeds) - min(speeds) or 1.0, max(bits) - min(bits) or 1.0
    named: dict[str, tuple[float, float, float]] = {}
    for label in sorted(dots, key=lambda label: (beaten(label), crowd(label))):
        x, y, half = dots[label][0] / wide, dots[label][1] / tall, 0.005 * len(label)
        if all(abs(x - a) > half + b or abs(y - c) > 0.05 for a, c, b in named.values()):
            named[label] = (x, y, half)
    return set(named)


def _side(row: Row) -> int:
    """-1 better than the dense model, 1 worse, 0 within noise or unknown."""
    found = row["difference"]
    if found["within_noise"] is not False:
        return 0
    return -1 if found["mean"] < 0 else 1
