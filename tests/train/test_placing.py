"""Experts that change their process while a run trains change nothing else."""

import json

import numpy as np
import pytest
import torch
from oracles.entry import entry
from oracles.placed_runs import GREEDY, OTHERS, alone_from_the_middle, placed_recipe
from oracles.ranks import run_ranks
from safetensors.torch import load_file

from moestro.inspect import write_report
from moestro.parallel import POLICIES, Cluster, LayerCost, MeshShape
from moestro.train import dump_recipe, load_recipe, train_run
from moestro.train.build import build_model, mesh_shape
from moestro.train.checkpoint_files import read_checkpoint
from moestro.train.files import read_lines
from moestro.train.placing import check_placing
from moestro.train.progress import Silent
from moestro.train.recipe import RecipeError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def said(folder):
    """What each run said; the runs are in the folder."""
    return run_ranks("oracles.placed_runs:run_all", 2, str(folder))[0]


def measured(run):
    records = read_lines(run / "metrics.jsonl")
    return [{key: value for key, value in each.items() if key != "tokens_per_second"} for each in records]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def moves(run):
    """What moved, step by step and layer by layer."""
    events = [event for event in read_lines(run / "events.jsonl") if event["event"] == "placement"]
    return [{"step": event["step"], **layer} for event in events for layer in event["layers"]]


@entry("smartmoe", "eplb")
def test_a_run_with_moving_experts_is_the_run_without_to_the_bit(method, folder, said):
    events = moves(folder / "greedy")
    assert len({event["step"] for event in events}) > 6
    assert sum(event["moved"] for event in events) > 20
    assert measured(folder / "greedy") == measured(folder / "order")
    ours, theirs = weights(folder / "greedy"), weights(folder / "order")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["greedy", "replicas"])
def test_a_run_that_goes_on_from_the_middle_moves_and_learns_as_before(folder, said, name):
    again, whole = folder / f"{name}-again", folder / name
    assert "moe: resumed after step 10" in said[f"{name}-again"]
    assert measured(again) == measured(whole)
    assert [event for event in moves(again) if event["step"] > 10]
    assert moves(again) == moves(whole)
    ours, theirs = weights(again), weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@entry("flexmoe", "eplb")
def test_with_replicas_a_run_learns_the_same_but_for_rounding(method, folder, said):
    without = measured(folder / "order")
    for name in ("replicas", *OTHERS):
        if name != "anti-correlation":
            assert moves(folder / name), name
        for ours, theirs in zip(measured(folder / name), without, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9), name
        ours, theirs = weights(folder / name), weights(folder / "order")
        assert all(torch.allclose(ours[key], theirs[key], rtol=1e-7, atol=1e-9) for key in ours), name
    slots = {len(event["slots"]) for event in moves(folder / "replicas")}
    assert slots == {12}


def test_a_checkpoint_says_where_experts_were(folder, said):
    saved = read_checkpoint(folder / "greedy" / "checkpoint" / "step-00000010").tensors
    (last,) = [each for each in moves(folder / "greedy") if each["step"] <= 10 and each["layer"] == "layers.0.moe"][
        -1:
    ]
    assert saved["placement.layers.0.moe.slots"].tolist() == last["slots"]
    assert saved["placement.layers.0.moe.loads"].shape == (10, 8)
    assert saved["placement.steps"].tolist() == [10]
    gates = [name for name in saved if name.startswith("model.layers.0.moe.experts.gate[")]
    assert len(gates) == 8


def test_what_two_processes_with_replicas_began_one_process_ends(folder, said):
    lines = alone_from_the_middle(folder)
    assert any("mesh was data=1 x expert=2 x tensor=1 and is one process" in line for line in lines)
    for ours, theirs in zip(measured(folder / "alone"), measured(folder / "order"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_run_says_what_will_move_what_moved_and_what_that_gains(folder, said):
    assert sum(line.startswith("placement: greedy decides every 2 steps") for line in said["greedy"]) == 1
    (line, *_) = [line for line in said["greedy"] if line.startswith("moe step 2: ")]
    assert "experts of" in line
    assert "MiB): the busiest process is foreseen " in line
    assert line.endswith(tuple("0123456789"))
    for event in moves(folder / "greedy"):
        assert 1 <= event["after"] <= event["before"]
        assert event["bytes"] == event["moved"] * 3 * 16 * 16 * 8 * 3  # weights and two moments


def test_the_result_and_the_report_say_what_moved(folder, said):
    result = json.loads((folder / "greedy" / "result.json").read_text())["placement"]
    events = moves(folder / "greedy")
    assert result == {
        "decisions": len({event["step"] for event in events}),
        "moved": sum(event["moved"] for event in events),
        "bytes": sum(event["bytes"] for event in events),
    }
    assert "placement" not in json.loads((folder / "order" / "result.json").read_text())
    pytest.importorskip("plotly")
    page = write_report(folder / "greedy").read_text()
    assert f"{result['moved']} experts changed their process" in page
    assert "changed their process" not in write_report(folder / "order").read_text()


def refusal(recipe, shape):
    model = build_model(recipe.model, vocab_size=16, sequence_length=16, seed=0)
    with pytest.raises(ValueError, match=r"parallel\.placement") as error:
        check_placing(recipe, model, shape)
    return str(error.value)


def test_what_would_have_no_effect_is_refused(tmp_path):
    recipe = placed_recipe(tmp_path, GREEDY)
    assert "moves experts between processes, and there is one" in refusal(recipe, None)
    assert "data=2 x expert=1 x tensor=1 gives every process all of them" in refusal(recipe, MeshShape(data=2))
    dense = recipe.model_copy(update={"model": recipe.model.model_copy(update={"method": None})})
    assert "a dense model has none" in refusal(dense, MeshShape(expert=2))
    mixed = recipe.model_copy(update={"model": recipe.model.model_copy(update={"method": "moe-plus-plus"})})
    assert "holds experts of several kinds, which cannot change places; leave" in refusal(
        mixed, MeshShape(expert=2)
    )
    with pytest.raises(ValueError, match="and there is one process"):
        train_run(recipe, tmp_path / "run", progress=Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"every": 5}, "every has no effect without a policy"),
        ({"policy": "best"}, "unknown policy 'best'; there are greedy"),
        ({"policy": "contiguous"}, "unknown policy 'contiguous'"),
        ({"policy": "refine"}, "did you mean refined"),
        ({"policy": "greedy", "slots": 12}, "greedy holds every expert once; leave slots out"),
        ({"policy": "refined", "predictor": "oracle"}, "unknown predictor 'oracle'"),
        ({"policy": "refined", "predictor": "arima", "every": 20}, "arima needs 26 steps"),
        ({"policy": "refined", "gain": 0.5}, "gain"),
        ({"policy": "refined", "flops": 1e12}, "refined compares loads only, flops has no effect; leave it out"),
        ({"policy": "flexmoe", "slots": 12, "between": 0}, "between"),
        ({"inside": 1e9}, "inside has no effect without a policy"),
    ],
)
def test_bad_words_are_one_sentence(tmp_path, words, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, {"parallel": {"placement": words}})


def test_speeds_of_a_recipe_decide_what_pays():
    words = {"policy": "flexmoe", "slots": 12, "flops": 1e9, "between": 1e6}
    section = load_recipe(None, {"parallel": {"placement": words}}).parallel.placement
    assert section.speeds == {"flops": 1e9, "between": 1e6}
    load = np.array([[50, 50, 50, 50, 50, 900, 50, 50]] * 3)

    def replicated(speeds):
        """Experts that both of two processes hold."""
        cluster = Cluster(2, 10, cost=LayerCost(16, 1_000_000, 8, **speeds))
        placement = POLICIES["flexmoe"](load, cluster)
        return set(placement.experts_of(0)) & set(placement.experts_of(1))

    assert 5 in replicated(section.speeds)  # the busiest, where products are dear
    assert replicated({"flops": 1e15, "inside": 1e3, "between": 1e3}) == set()  # where gradients of replicas are


def test_a_policy_that_is_taken_away_takes_its_options_along(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(placed_recipe(tmp_path, GREEDY)))
    assert load_recipe(path).parallel.placement.every == 2
    assert load_recipe(path, {"parallel.placement.policy": "none"}).parallel.placement.policy is None
    assert load_recipe(path, {"parallel.placement.every": 3}).parallel.placement.every == 3


def test_replicas_let_experts_be_spread_that_would_not_divide():
    assert mesh_shape("auto", 4, 6, slots=8).expert == 4
    assert mesh_shape("expert=4", 4, 6, slots=8).expert == 4
    with pytest.raises(ValueError, match="6 experts cannot be shared evenly by 4 ranks"):
        mesh_shape("expert=4", 4, 6)
    with pytest.raises(ValueError, match="9 slots cannot be shared evenly by 4 ranks"):
        mesh_shape("expert=4", 4, 6, slots=9)
