"""Which folders a run may use."""

import os

import pytest
from oracles.tiny_run import tiny_recipe

from moestro.train.folder import check_folder, claim_folder


def test_a_new_or_empty_folder_is_fine_and_the_check_writes_nothing(tmp_path):
    recipe = tiny_recipe(tmp_path / "text.txt")
    check_folder(tmp_path / "a" / "b", recipe, resume=False, overwrite=False)
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty", recipe, resume=False, overwrite=False)


def test_another_run_is_refused_unless_resumed_or_overwritten(tmp_path):
    recipe, out = tiny_recipe(tmp_path / "text.txt"), tmp_path / "run"
    claim_folder(out, recipe, resume=False)
    with pytest.raises(ValueError, match="holds another run; pass --resume to continue it or --overwrite"):
        check_folder(out, recipe, resume=False, overwrite=False)
    check_folder(out, recipe, resume=True, overwrite=False)
    check_folder(out, recipe, resume=False, overwrite=True)
    with pytest.raises(ValueError, match="pass one of them"):
        check_folder(out, recipe, resume=True, overwrite=True)


def test_another_recipe_is_not_resumed_and_the_keys_are_named(tmp_path):
    out = tmp_path / "run"
    claim_folder(out, tiny_recipe(tmp_path / "text.txt"), resume=False)
    other = tiny_recipe(tmp_path / "text.txt", options={"top_k": 1}, steps=9)
    with pytest.raises(ValueError) as caught:
        check_folder(out, other, resume=True, overwrite=False)
    assert "model.options.top_k (None there, 1 now), train.steps (6 there, 9 now)" in str(caught.value)


def test_files_of_others_are_never_deleted(tmp_path):
    recipe, out = tiny_recipe(tmp_path / "text.txt"), tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"not a run's, such as thesis\.tex"):
            check_folder(out, recipe, resume=False, overwrite=overwrite)
    with pytest.raises(ValueError, match="holds no run to resume"):
        check_folder(out, recipe, resume=True, overwrite=False)
    with pytest.raises(ValueError, match="is a file"):
        check_folder(out / "thesis.tex", recipe, resume=False, overwrite=False)


def test_overwriting_removes_what_the_run_before_left(tmp_path):
    recipe, out = tiny_recipe(tmp_path / "text.txt"), tmp_path / "run"
    claim_folder(out, recipe, resume=False)
    (out / "twin" / "model").mkdir(parents=True)
    (out / "metrics.jsonl").touch()
    claim_folder(out, recipe, resume=False)
    assert os.listdir(out) == ["recipe.yaml"]
