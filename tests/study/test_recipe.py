"""What a study's recipe may say, and the sentence for what it may not."""

import pytest

from moestro.methods import all_methods
from moestro.study.recipe import dump_study, entries, file_name, load_study
from moestro.train import RecipeError, load_recipe, shipped_recipes


def written(tmp_path, text):
    file = tmp_path / "some.yaml"
    file.write_text(text)
    return file


def test_the_shipped_study_has_every_causal_method():
    study = load_study("study")
    assert [entry.method for entry in entries(study)] == [m.name for m in all_methods().values() if m.causal]
    assert len(study.seeds) == 3
    assert study.train.threads == 1


def test_a_grid_is_one_row_per_combination(tmp_path):
    text = "methods: [switch, {method: mixtral, grid: {top_k: [1, 2], balance: [0.0, 0.1]}}]"
    found = entries(load_study(written(tmp_path, text)))
    assert [entry.label for entry in found] == [
        "switch",
        "mixtral top_k=1 balance=0.0",
        "mixtral top_k=1 balance=0.1",
        "mixtral top_k=2 balance=0.0",
        "mixtral top_k=2 balance=0.1",
    ]
    assert found[3].options == {"top_k": 2, "balance": 0.0}


def test_a_study_is_read_back_as_it_was_written(tmp_path):
    study = load_study("study")
    assert load_study(written(tmp_path, dump_study(study))) == study


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [mixtrel]", "some.yaml:1: unknown method 'mixtrel'; did you mean mixtral?"),
        ("methods: causal\nwithout: [nosuch]", "some.yaml:2: unknown method 'nosuch'"),
        ("methods: causal\nsettings: {nosuch: {}}", "some.yaml:2: unknown method 'nosuch'"),
        ("methods: [{method: switch, options: {top_k: 2}}]", "switch has no option 'top_k'"),
        ("methods: [{method: mixtral, grid: {top_k: [1, two]}}]", "expected int"),
        ("methods: [mixtral, mixtral]", "two rows of the study are called 'mixtral'"),
        ("methods: [{method: mixtral, label: dense}]", "two rows of the study are called 'dense'"),
        ("methods: [mixtral]\nseeds: [1, 1]", "seeds are different whole numbers"),
        ("methods: [mixtral]\nseeds: []", "seeds"),
        ("methods: [mixtral]\nmodel: {method: switch}", "a study names them under methods"),
        ("methods: [mixtral]\nwithout: [switch]", "without and settings are for methods: causal"),
        ("methods: [mixtral]\nworkers: 2", "unknown key workers"),
        ("seeds: [0]", "methods"),
    ],
)
def test_bad_input_gets_a_sentence(tmp_path, text, message):
    with pytest.raises(RecipeError) as caught:
        load_study(written(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_study_is_not_trained_as_a_run():
    with pytest.raises(RecipeError, match="moestro study"):
        load_recipe(shipped_recipes()["study"])


def test_labels_become_folders():
    assert file_name("mixtral top_k=2 balance=0.1") == "mixtral_top_k=2_balance=0.1"
    assert "/" not in file_name("a/b")
