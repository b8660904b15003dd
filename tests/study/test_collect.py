"""The table of a study, from runs whose numbers are known."""

import json

import pytest
from scipy import stats

from moestro.study.collect import collect_rows, noise
from moestro.study.match import Match
from moestro.study.plan import Job, Row
from moestro.train import load_recipe

BITS = {"dense": (3.00, 3.10, 3.20), "good": (2.90, 3.01, 3.09), "same": (3.05, 3.05, 3.25), "bad": (3.5, 3.6, 3.7)}


def layer(load, norm=0.1, dropped=0.0, entropy=0.5):
    return {"name": "m", "load": load, "entropy": entropy, "dropped": dropped, "router_grad_norm": norm}


def make(tmp_path, bits=BITS, layers=None, failed=()):
    """Folders of finished runs; `layers` are the routing records of one label."""
    recipe = load_recipe()
    sizes = Match(recipe.model, 100, 400)
    rows = [Row(label, None if label == "dense" else "mixtral", {}, sizes) for label in bits]
    jobs = [Job(row, seed, recipe, tmp_path / row.label / f"seed{seed}") for seed in range(3) for row in rows]
    for job in jobs:
        job.folder.mkdir(parents=True)
        if job.name in failed:
            job.failure.write_text(json.dumps({"problem": "the loss is nan"}))
            continue
        result = {"validation_bits_per_byte": bits[job.row.label][job.seed], "seconds": 1.0, "dead_experts": 1}
        (job.folder / "result.json").write_text(json.dumps(result))
        records = [{"step": i, "layers": [one]} for i, one in enumerate((layers or {}).get(job.row.label, []))]
        (job.folder / "routing.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        curve = [{"step": 10, "bits_per_byte": 4.0 + job.seed}]
        (job.folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in curve))
    return rows, jobs


def test_rows_are_ranked_and_paired_by_seed(tmp_path):
    rows = collect_rows(*make(tmp_path), {})
    assert [(row["rank"], row["label"]) for row in rows] == [(1, "good"), (2, "dense"), (3, "same"), (4, "bad")]
    good, dense, same, bad = rows
    assert dense["difference"] is None
    low, high = stats.t.interval(0.95, 2, loc=-0.1, scale=stats.sem([-0.10, -0.09, -0.11]))
    assert good["difference"]["mean"] == pytest.approx(-0.1)
    assert good["difference"]["half_width"] == pytest.approx((high - low) / 2)
    assert good["difference"]["within_noise"] is False  # though the intervals of the means overlap widely
    assert good["bits_per_byte"]["half_width"] > 0.2
    assert same["difference"]["within_noise"] is True
    assert bad["difference"]["within_noise"] is False
    assert dense["within_noise"] == [3]
    assert bad["within_noise"] == []
    assert dense["curve"] == {"steps": [10], "bits_per_byte": [5.0]}


def test_a_failed_run_is_said_and_the_others_count(tmp_path):
    rows = collect_rows(*make(tmp_path, failed=("good seed 1", *(f"bad seed {i}" for i in range(3)))), {})
    good, bad = rows[0], rows[-1]
    assert good["flags"] == ["failed with 1 of 3 seeds"]
    assert good["bits_per_byte"]["seeds"] == 2
    assert good["difference"]["mean"] == pytest.approx((-0.10 - 0.11) / 2)  # seeds 0 and 2
    assert (bad["rank"], bad["bits_per_byte"], bad["difference"], bad["within_noise"]) == (None, None, None, [])
    assert [run["problem"] for run in bad["runs"]] == ["the loss is nan"] * 3


def test_statistics_are_of_the_last_tenth(tmp_path):
    early, late = layer([1.0, 0.0], dropped=0.9, entropy=0.1), layer([0.75, 0.25], dropped=0.2, norm=0.3)
    rows = collect_rows(*make(tmp_path, layers={"good": [early] * 9 + [late]}), {"good": {"relative": 0.5}})
    good = rows[0]
    assert good["load_cv"] == pytest.approx(0.5)  # shares 3/4 and 1/4: deviation 1/4 of mean 1/2
    assert good["dropped"] == pytest.approx(0.2)
    assert good["entropy"] == pytest.approx(0.5 / 0.6931471805599453)
    assert good["router_grad_norm"] == pytest.approx(0.3)
    assert good["speed"] == {"relative": 0.5}
    assert good["flags"] == []


def test_a_load_that_evens_out_over_batches_has_no_variation(tmp_path):
    turns = [layer([1.0, 0.0]), layer([0.0, 1.0])] * 10
    assert collect_rows(*make(tmp_path, layers={"good": turns}), {})[0]["load_cv"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("records", "flags"),
    [
        (
            [layer([0.5, 0.5], norm=0.1)] * 19 + [layer([0.5, 0.5], norm=0.0)] * 1,
            [],
        ),  # not both
        ([layer([0.5, 0.5], norm=0.1)] * 18 + [layer([0.5, 0.5], norm=0.0)] * 2, ["dead router"]),
        ([layer([0.5, 0.5], norm=None)] * 20, []),  # nothing to learn
        ([layer([0.97, 0.03])] * 20, ["collapsed"]),
        ([layer([0.94, 0.06])] * 20, []),
    ],
)
def test_dead_and_collapsed_routers_are_flagged(tmp_path, records, flags):
    assert collect_rows(*make(tmp_path, layers={"good": records}), {})[0]["flags"] == flags


def test_noise_is_of_the_rows_with_most_seeds(tmp_path):
    rows = collect_rows(*make(tmp_path, failed=("bad seed 1",)), {})
    found = noise(rows)
    assert (found["seeds"], found["methods"]) == (3, 3)
    assert 0 < found["least_significant_difference"] < 0.2
    assert noise(rows[:1]) is None
