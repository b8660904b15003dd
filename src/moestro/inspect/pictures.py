"""The pictures of a report, as plotly figures turned into plain JSON; plotly is imported where it is used."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from moestro.inspect.reduce import pooled, smoothed, thinned

MOE, TWIN, DEAD = "#3d7cc9", "#d5812f", "#d0413c"
"""Colours that read well on a light and on a dark page."""

_DEPTHS = ("#2a9d8f", "#3d7cc9", "#7b61c9", "#c2508f")
_COLUMNS = 160  # more columns than this cannot be told apart on a screen

Spec = dict[str, Any]
Series = tuple[Sequence[float], Sequence[float]]


def plotly_script() -> str:
    """The whole of plotly.js, to be put into the page once."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the report draws with plotly, which is not installed; pip install 'moestro[report]'"
        ) from None
    return str(get_plotlyjs())


def loss_curves(curves: Mapping[str, Series]) -> Spec:
    """Training loss of the model and, second, its twin: faint as measured, bold as smoothed."""
    import plotly.graph_objects as go

    figure = go.Figure()
    tops: list[float] = []
    for colour, (name, curve) in zip((MOE, TWIN), curves.items(), strict=False):
        steps, values = thinned(*curve, 1500)
        smooth = smoothed(values)
        faint = {"color": colour, "width": 1}
        figure.add_scatter(x=steps, y=values, line=faint, opacity=0.28, hoverinfo="skip", showlegend=False)
        figure.add_scatter(x=steps, y=smooth, line={"color": colour, "width": 2.2}, name=name)
        tops.append(max(smooth[len(smooth) // 20 :]))
    spec = figure_spec(figure, "step", "nats per token", 320)
    lowest = [y for trace in spec["data"] for y in trace["y"]]
    room = 0.06 * (max(tops) - min(lowest)) or 0.05
    spec["layout"]["yaxis"]["range"] = [min(lowest) - room, max(tops) + room]
    spec["layout"]["xaxis"]["rangemode"] = "tozero"
    return spec


def validation_curves(curves: Mapping[str, Series], unit: str) -> Spec:
    """Validation measurements of the model and, second, its twin, the last one labelled with its value."""
    import plotly.graph_objects as go

    figure = go.Figure()
    lowest = min(values[-1] for _, values in curves.values())
    for colour, (name, curve) in zip((MOE, TWIN), curves.items(), strict=False):
        labels = [""] * (len(curve[1]) - 1) + [f"{curve[1][-1]:.3f}"]
        figure.add_scatter(
            x=list(curve[0]),
            y=list(curve[1]),
            name=name,
            mode="lines+markers+text",
            text=labels,
            textposition="bottom center" if curve[1][-1] == lowest else "top center",
            textfont={"color": colour, "size": 13},
            line={"color": colour, "width": 2.2},
            marker={"size": 7 if len(labels) <= 20 else 4},
            cliponaxis=False,
            hovertemplate="step %{x}: %{y:.4f}<extra>" + name + "</extra>",
        )
    spec = figure_spec(figure, "step", unit, 320)
    low, high = (edge(edge(trace["y"]) for trace in spec["data"]) for edge in (min, max))
    room = 0.12 * (high - low) or 0.05
    spec["layout"]["xaxis"]["rangemode"] = "tozero"
    spec["layout"]["yaxis"]["range"] = [low - room, high + room]
    return spec


def load_over_time(steps: Sequence[int], loads: Sequence[Sequence[float]]) -> Spec:
    """Heat map step × expert; colour is the load in units of the fair share, 1 in the middle."""
    import plotly.graph_objects as go

    num_experts = len(loads[0])
    times, columns = pooled(steps, loads, _COLUMNS)
    rows = [[column[e] * num_experts for column in columns] for e in range(num_experts)]
    heat = go.Heatmap(
        x=[str(time) for time in times] if len(times) == 1 else times,
        y=list(range(num_experts)),
        z=rows,
        coloraxis="coloraxis",
        hovertemplate="step %{x}, expert %{y}: %{z:.2f} × fair share<extra></extra>",
    )
    spec = figure_spec(go.Figure(heat), "step", "expert", max(190, min(130 + 9 * num_experts, 560)))
    spec["layout"]["coloraxis"] = {"cmin": 0, "cmax": 2, "colorbar": _bar(["0", "½×", "fair", "1½×", "≥ 2×"], 0.5)}
    spec["layout"]["meta"] = {"scale": "diverging"}
    spec["layout"]["yaxis"] |= {"showgrid": False, "dtick": expert_tick(num_experts), "autorange": "reversed"}
    spec["layout"]["xaxis"]["showgrid"] = False
    return spec


def final_load(load: Sequence[float], dead: Sequence[int]) -> Spec:
    """Bars of the share of every expert, a dashed line at the fair share, dead experts in red."""
    import plotly.graph_objects as go

    percent = [100 * share for share in load]
    colours = [DEAD if expert in dead else MOE for expert in range(len(load))]
    names = ["dead" if expert in dead else "" for expert in range(len(load))]
    bars = go.Bar(
        x=list(range(len(load))),
        y=percent,
        marker={"color": colours},
        text=names,
        textposition="outside",
        textfont={"color": DEAD, "size": 11},
        textangle=-90,
        constraintext="none",
        cliponaxis=False,
        hovertemplate="expert %{x}: %{y:.2f} %<extra></extra>",
    )
    fair = 100 / len(load)
    figure = go.Figure(bars)
    figure.add_hline(y=fair, line={"dash": "dash", "width": 1.5, "color": TWIN})
    spec = figure_spec(figure, "expert", "% of the choices", 230)
    spec["layout"]["xaxis"] |= {"dtick": expert_tick(len(load)), "showgrid": False}
    spec["layout"]["yaxis"]["range"] = [0, 1.12 * max(*percent, 1.6 * fair)]
    spec["layout"]["bargap"] = 0.18
    return spec


def lines_per_layer(curves: Mapping[str, Series], unit: str, ceiling: tuple[float, str] | None = None) -> Spec:
    """One line per layer over time, coloured from the first layer to the last."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for (name, (steps, values)), colour in zip(curves.items(), by_depth(len(curves)), strict=True):
        times, columns = pooled([int(step) for step in steps], [[value] for value in values], 4 * _COLUMNS)
        figure.add_scatter(
            x=times, y=[column[0] for column in columns], name=html.escape(name), line={"color": colour, "width": 2}
        )
    spec = figure_spec(figure, "step", unit, 280)
    spec["layout"]["yaxis"]["rangemode"] = "tozero"
    if ceiling is not None:
        value, label = ceiling
        note = {"text": label, "font": {"size": 11}}
        spec["layout"]["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value}
            | {
                "line": {"dash": "dash", "width": 1.2, "color": "#8b8f98"},
                "label": note | {"textposition": "start"},
            }
        ]
        spec["layout"]["yaxis"]["range"] = [0, 1.14 * value]
    return spec


def domains_by_expert(shares: Sequence[Sequence[float]], domains: Sequence[str], most: float) -> Spec:
    """Heat map expert × domain: the share of a domain's choices that an expert gets, in percent.

    The darkest colour means `most`, a share; layers that are compared need the same. With two domains the
    experts are sorted from the friend of the first to the friend of the second.
    """
    import plotly.graph_objects as go

    num_experts = len(shares[0])
    order = list(range(num_experts))
    if len(domains) == 2:
        order.sort(key=lambda e: (shares[0][e] + 1e-4) / (shares[1][e] + 1e-4))  # plotly draws upwards
    else:
        order.reverse()
    cells = [[100 * row[e] for row in shares] for e in order]
    texts = [[f"{cell:.1f}" if num_experts <= 64 else "" for cell in row] for row in cells]
    heat = go.Heatmap(
        x=[html.escape(name) for name in domains],
        y=[str(e) for e in order],
        z=cells,
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 11},
        xgap=2,
        ygap=1,
        coloraxis="coloraxis",
        hovertemplate="expert %{y} gets %{z:.2f} % of %{x}<extra></extra>",
    )
    spec = figure_spec(go.Figure(heat), "", "expert", 70 + max(140, min(18 * num_experts, 1100)))
    spec["layout"]["coloraxis"] = {"cmin": 0, "cmax": 100 * most, "showscale": False}
    spec["layout"]["meta"] = {"scale": "sequential"}
    spec["layout"]["xaxis"] |= {"type": "category", "showgrid": False, "side": "top", "ticks": ""}
    spec["layout"]["yaxis"] |= {
        "type": "category",
        "showgrid": False,
        "dtick": expert_tick(num_experts, 64),
        "ticks": "",
    }
    spec["layout"]["margin"] |= {"t": 28, "b": 8}
    return spec


def figure_spec(figure: Any, x: str, y: str, height: int) -> Spec:
    """The figure as data and layout for the page, which adds fonts and the colours of its theme."""
    axis = {"automargin": True, "zeroline": False, "ticks": "outside", "ticklen": 4}
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 48, "r": 16, "t": 12, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis=axis | {"title": {"text": x, "standoff": 6}},
        yaxis=axis | {"title": {"text": y, "standoff": 6}},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hovermode="closest",
    )
    spec = figure.to_plotly_json()
    spec["layout"].pop("template", None)
    return {"data": [_plain(trace) for trace in spec["data"]], "layout": _plain(spec["layout"])}


def _plain(value: Any) -> Any:
    """Lists for tuples, as JSON would have it, and five digits of each number: no picture shows more."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _bar(labels: Sequence[str], step: float) -> dict[str, Any]:
    values = [i * step for i in range(len(labels))]
    return {"thickness": 8, "outlinewidth": 0, "tickvals": values, "ticktext": list(labels), "ticks": "", "len": 1}


def expert_tick(num_experts: int, most: int = 16) -> int:
    """Distance of labelled experts so that at most `most` are."""
    return 2 ** max(math.ceil(math.log2(num_experts / most)), 0) if num_experts else 1


def by_depth(count: int) -> list[str]:
    if count <= 1:
        return [_DEPTHS[1]] * count
    from plotly.colors import sample_colorscale

    scale = [[i / (len(_DEPTHS) - 1), colour] for i, colour in enumerate(_DEPTHS)]
    return list(sample_colorscale(scale, [i / (count - 1) for i in range(count)]))
