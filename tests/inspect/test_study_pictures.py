"""The pictures of a study stay readable with sixty methods."""

import pytest

pytest.importorskip("plotly")

from moestro.inspect.study_pictures import differences, trade


def row(label: str, speed: float, bits: float, difference: float = 0.0) -> dict:
    return {
        "label": label,
        "method": label,
        "speed": {"relative": speed},
        "bits_per_byte": {"mean": bits},
        "difference": {"mean": difference, "half_width": 0.01, "within_noise": False},
    }


def test_names_in_a_crowd_give_way_and_unbeaten_methods_keep_theirs():
    crowd = [row(f"crowd-{i}", 0.5 + 0.001 * i, 3.0 + 0.0001 * i) for i in range(20)]
    rows = [row("best", 0.5, 2.7), row("fast", 0.9, 2.9), *crowd, row("slow", 0.1, 3.3)]
    (dots,) = trade(rows)["data"]
    shown = [name for name in dots["text"] if name]
    assert {"best", "fast", "slow"} <= set(shown)
    assert sum(name.startswith("crowd") for name in shown) == 1
    assert list(dots["customdata"]) == [each["label"] for each in rows]


def test_a_method_beyond_the_axis_says_how_far():
    rows = [row(f"m{i}", 0.5, 3.0, 0.01 * i) for i in range(30)] + [row("thor", 0.5, 4.0, 1.08)]
    spec = differences(rows)
    (note,) = spec["layout"]["annotations"]
    assert (note["y"], note["text"]) == ("thor", "+1.08 →")
    assert spec["layout"]["xaxis"]["range"][1] < 1.08
