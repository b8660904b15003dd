"""`moestro plan`: what a recipe costs."""

import json

import pytest
from oracles.ranks import run_ranks

from moestro.cli import main
from moestro.cli.planning import plan_run
from moestro.methods import all_methods
from moestro.train import load_recipe
from moestro.train.build import build_model

SMALL = {
    "model": {"width": 32, "num_layers": 2, "num_heads": 2, "num_experts": 4, "expert_hidden": 16},
    "data": {"sequence_length": 16},
    "train": {"batch_size": 4, "steps": 10, "threads": 1, "accumulate": 2},
}


def test_parameters_are_those_of_the_built_model():
    recipe = load_recipe(None, {"train": {"threads": 1}})
    facts = plan_run(recipe, probe=False)["models"]
    model = build_model(recipe.model, vocab_size=256, sequence_length=256, seed=0)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert facts["model"]["parameters"]["total"] == total
    assert facts["model"]["parameters"]["active"] == model.parameter_counts().active
    twin = sum(parameter.numel() for parameter in model.dense_twin().parameters())
    assert facts["dense twin"]["parameters"]["total"] == twin
    forward = model.flops_per_token(256)
    assert facts["model"]["flops_per_token"] == forward
    assert facts["model"]["training_flops"] == 3 * forward * recipe.train.steps * recipe.train.batch_size * 256


def test_a_probe_tells_the_time_of_both_models():
    facts = plan_run(load_recipe(None, SMALL))
    assert facts["fits"]
    assert facts["tokens"] == 10 * 4 * 16
    for model in facts["models"].values():
        assert model["seconds"] == pytest.approx(facts["tokens"] / model["tokens_per_second"])
    assert facts["seconds"] == pytest.approx(sum(model["seconds"] for model in facts["models"].values()))


def test_what_does_not_fit_is_said_and_not_built():
    huge = {**SMALL, "model": {**SMALL["model"], "num_experts": 10**6, "expert_hidden": 10**5}}
    facts = plan_run(load_recipe(None, huge))  # 77 TB of weights: building them would fail
    assert not facts["fits"]
    assert facts["seconds"] is None
    assert facts["models"]["model"]["peak_memory"] > facts["available_memory"]


def test_without_twin_there_is_one_model():
    facts = plan_run(load_recipe(None, {**SMALL, "twin": False}), probe=False)
    assert list(facts["models"]) == ["model"]


def test_a_tokenizer_to_be_trained_counts_as_large_as_asked():
    facts = plan_run(load_recipe(None, {**SMALL, "data": {"tokenizer": "bpe:1000"}}), probe=False)
    assert facts["models"]["model"]["parameters"]["embedding"] == 1000 * 32


def test_the_command_prints_tables_or_json(capsys):
    words = ["plan", "--no-probe", "--model.width", "32", "--model.num-heads", "2"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for label in ("total", "active", "optimiser", "peak", "forward FLOPs per token", "fits into memory"):
        assert label in text
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    total = facts["models"]["model"]["parameters"]["total"]
    assert f"{total:,}".replace(",", " ") in text


@pytest.mark.parametrize("name", [name for name, method in all_methods().items() if method.causal])
def test_every_causal_method_can_be_planned(name):
    model = SMALL["model"] | {"method": name, "num_experts": 16}
    facts = plan_run(load_recipe(None, SMALL | {"model": model}), probe=False)["models"]["model"]
    assert facts["parameters"]["active"] > 0
    assert facts["peak_memory"] > 0


def test_a_method_with_parts_for_each_domain_counts_the_folders_of_the_text(tmp_path):
    for folder in ("german", "french", "latin"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("some words")
    paths = [str(tmp_path / folder) for folder in ("german", "french", "latin")]
    recipe = load_recipe(None, SMALL | {"model": SMALL["model"] | {"method": "mmoe-ple"}, "data": {"paths": paths}})
    section = recipe.model.model_copy(update={"options": {"num_domains": 3}})
    built = build_model(section, vocab_size=256, sequence_length=16, seed=0)
    facts = plan_run(recipe, probe=False)["models"]["model"]
    assert facts["parameters"]["total"] == built.parameter_counts().total


MESHES = ("data=2,expert=2", "expert=4", "expert=2,tensor=2", "data=4")


def test_rows_that_the_plan_foresees_are_those_that_processes_send():
    precise = {**SMALL, "twin": False, "train": {**SMALL["train"], "accumulate": 1, "precision": "float32"}}
    everyones = run_ranks("oracles.even_traffic:sent", 4, {"recipe": precise, "meshes": MESHES})
    for words in MESHES:
        planned = everyones[0][words][1]
        assert [each[words] for each in everyones] == [[planned, planned]] * 4, words
    assert everyones[0]["data=4"] == [0, 0]
    assert everyones[0]["expert=4"][0] > 0


def test_what_each_of_several_processes_holds(capsys):
    held, whole = {}, {**SMALL, "train": {**SMALL["train"], "accumulate": 1}}
    for words, shard in (("data=4", False), ("expert=4", False), ("expert=4", True)):
        recipe = load_recipe(None, {**whole, "parallel": {"mesh": words, "shard_optimiser": shard}})
        facts = plan_run(recipe, probe=False, processes=4)
        held[words, shard] = facts["parallel"]["models"]["model"]["memory"]
    total = facts["models"]["model"]["parameters"]["total"]
    experts = facts["models"]["model"]["parameters"]["components"]["experts"]
    dense = total - experts
    assert held["data=4", False] == {"weights": 4 * total, "gradients": 4 * total, "optimiser": 8 * total}
    few = 4 * (dense + experts // 4)
    assert held["expert=4", False] == {"weights": few, "gradients": few, "optimiser": 2 * few}
    assert held["expert=4", True]["optimiser"] == 8 * (dense // 4 + experts // 4)
    shared = load_recipe(None, {**whole, "parallel": {"mesh": "data=4", "shard_dense": True}})
    facts = plan_run(shared, probe=False, processes=4)["parallel"]["models"]["model"]
    few = 4 * (dense // 4 + experts)
    assert facts["memory"] == {"weights": few, "gradients": few, "optimiser": 2 * few}
    assert facts["sent"]["dense weights"] == 2 * 3 * dense  # three quarters of it, forward and backward
    assert facts["sent"]["gradients"] == 3 * dense + 6 * experts
    assert plan_run(recipe, probe=False)["parallel"] is None
    assert main(["plan", "--no-probe", "--processes", "3", "--mesh", "expert=2"]) == 2
    assert "3 processes fit no mesh with expert=2 and tensor=1; start 2, 4, 6, 8" in capsys.readouterr().err
    assert main(["plan", "--no-probe", "--processes", "4", "--mesh", "data=2,expert=2"]) == 0
    out = capsys.readouterr().out
    assert "mesh data=2 x expert=2 x tensor=1: 8 experts of every layer and 1024 tokens a step each" in out
    assert "sends rows to each process with other experts" in out
