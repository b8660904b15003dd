"""Several processes and one part in float32 only where a token's choice hangs on rounding."""

import pytest
from oracles.curves import curve, curve_of_several
from oracles.tiny_run import tiny_recipe

from moestro.train import load_recipe


def test_with_the_same_routes_processes_follow_the_curve_of_one(tmp_path):
    recipe = tiny_recipe(tmp_path / "text.txt", batch_size=8, steps=30, learning_rate=1e-2)
    one = curve(recipe, 30)
    assert one.losses[-1] < one.losses[0] - 0.5
    two = curve_of_several(recipe, 30, 2, tmp_path / "two", one.routes)
    assert 0 < one.distance(two).max() < 1e-5  # other roundings, no other choices


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_nothing_but_choices_parts_the_curves_of_the_first_recipe(tmp_path, capsys):
    steps, recipe = 100, first_recipe("float32")
    one = curve(recipe, steps)
    parts = curve(recipe, steps, accumulate=4)  # one process, its sums in another order
    free = curve_of_several(recipe, steps, 4, tmp_path / "free", None)
    forced = curve_of_several(recipe, steps, 4, tmp_path / "forced", one.routes)
    switched = one.switches(parts)
    with capsys.disabled():
        print(f"\nchoices that differ in 4 micro-batches, by step: {switched}")
        for name, found in {"4 micro-batches": parts, "4 processes": free, "with its routes": forced}.items():
            say(name, one.distance(found))
    same = next((step for step, count in enumerate(switched) if count), steps)
    assert one.distance(parts)[:same].max() < 1e-5
    assert one.distance(free)[:8].max() < 1e-5
    assert one.distance(forced).max() < 1e-4


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_in_float64_four_processes_follow_the_curve_of_one(tmp_path, capsys):
    recipe = first_recipe("float64")
    distance = curve(recipe, 100).distance(curve_of_several(recipe, 100, 4, tmp_path / "four", None))
    with capsys.disabled():
        print()
        say("4 processes, float64", distance)
    assert distance.max() < 1e-10


def first_recipe(precision):
    settings = {"train.threads": 1, "train.steps": 100, "parallel.mesh": "data=2,expert=2"}
    return load_recipe("first", settings | {"train.precision": precision})


def say(name, distance):
    parts = ", ".join(f"{distance[:n].max():.1e} in {n}" for n in (8, 10, 12, 16, 20, 50, 100))
    print(f"{name}: {parts} steps", flush=True)
