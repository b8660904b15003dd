"""A mesh in words: one spelling, or one sentence that says what is wrong."""

import pytest

from moestro.train.build import mesh_shape
from moestro.train.recipe import ParallelSection, Recipe, RecipeError, load_recipe


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("auto", "auto"),
        (" expert = 2 , data=3", "data=3,expert=2"),
        ({"expert": 4}, "expert=4"),
        ("tensor=2,expert=2,data=1", "data=1,expert=2,tensor=2"),
    ],
)
def test_a_mesh_has_one_spelling(given, words):
    assert ParallelSection(mesh=given).mesh == words


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("experts=2", "'experts' is no axis of a mesh; pass auto, or for example data=2,expert=2"),
        ("expert=0", "expert=0: expected a whole number from 1 on"),
        ("expert=two", "expert=two: expected a whole number from 1 on"),
        ("expert=2,expert=4", "expert is given twice"),
        (4, "expected auto or for example data=2,expert=2, not 4"),
    ],
)
def test_what_is_no_mesh_is_refused_in_a_sentence(given, message, tmp_path):
    (tmp_path / "r.yaml").write_text("model: {method: null}\n")
    with pytest.raises(RecipeError, match=f"--parallel.mesh: parallel.mesh: {message}"):
        load_recipe(tmp_path / "r.yaml", {"parallel.mesh": given})


def test_an_unknown_transport_is_refused_by_its_place(tmp_path):
    (tmp_path / "r.yaml").write_text("parallel:\n  transport: linaer\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2: unknown transport 'linaer'; did you mean linear\?"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("words", "processes", "experts", "sizes"),
    [
        ("auto", 4, 16, (1, 4, 1)),
        ("auto", 4, 6, (2, 2, 1)),
        ("auto", 3, 16, (3, 1, 1)),
        ("auto", 4, None, (4, 1, 1)),
        ("expert=2", 4, 16, (2, 2, 1)),
        ("data=1,expert=2,tensor=2", 4, 16, (1, 2, 2)),
    ],
)
def test_a_mesh_for_so_many_processes(words, processes, experts, sizes):
    shape = mesh_shape(words, processes, experts)
    assert (shape.data, shape.expert, shape.tensor) == sizes


def test_processes_that_no_such_mesh_has_are_named():
    with pytest.raises(ValueError, match=r"4 processes fit no mesh with expert=3 .*start 3, 6, 9, 12"):
        mesh_shape("expert=3", 4, 15)
    with pytest.raises(ValueError, match=r"needs 4 processes but there are 1; start 4, or pass another --mesh"):
        mesh_shape("data=2,expert=2", 1, 16)
    with pytest.raises(ValueError, match=r"16 experts cannot be shared evenly by 3 ranks .* over 1, 2, 4, 8, 16"):
        mesh_shape("expert=3", 3, 16)


def test_a_recipe_without_the_section_has_its_defaults():
    assert Recipe.model_validate({}).parallel == ParallelSection()
