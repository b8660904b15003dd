"""The options of `moestro train` are the recipe's keys."""

import re

import pytest
from pydantic import BaseModel

from moestro.cli import main
from moestro.cli.flags import overrides, parse_value
from moestro.cli.train import app
from moestro.train import Recipe


def leaves(section: type[BaseModel], prefix: str = "--"):
    """Every option name that the schema implies, with its description."""
    for name, field in section.model_fields.items():
        option = prefix + name.replace("_", "-")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{option}.")
        else:
            yield option, field.description


def given(*words: str) -> dict:
    """What the flags of `moestro train` say, as overrides of a recipe."""
    _, bound, _ = app.parse_args(list(words), exit_on_error=False, print_error=False)
    return overrides(bound.arguments.get("flags"))


def test_help_lists_every_key_of_a_recipe_with_its_description(capsys):
    main(["train", "--help"])
    out = capsys.readouterr().out
    for option, description in leaves(Recipe):
        assert re.search(rf"{re.escape(option)}\b", out), option
        assert description in out, option


def test_only_what_is_given_overrides():
    assert given() == {}
    assert given("--seed", "3", "--no-twin") == {"seed": 3, "twin": False}
    assert given("--model.width", "64", "--train.learning-rate", "1e-3", "--model.qk-norm") == {
        "model": {"width": 64, "qk_norm": True},
        "train": {"learning_rate": 1e-3},
    }


def test_short_names_mean_the_same():
    assert given("--method", "switch", "--steps", "5") == given("--model.method", "switch", "--train.steps", "5")


def test_paths_may_be_several():
    assert given("--data.paths", "a.txt", "b") == {"data": {"paths": ("a.txt", "b")}}


def test_what_may_be_open_takes_none():
    assert given("--model.head-dim", "none", "--method", "none") == {"model": {"head_dim": None, "method": None}}


def test_options_of_a_method_become_values():
    options = given("--model.options.top-k", "1", "--model.options.capacity_factor", "1e-3")["model"]["options"]
    assert options == {"top_k": 1, "capacity_factor": 1e-3}


@pytest.mark.parametrize(
    ("word", "value"),
    [("1", 1), ("-2", -2), ("1e-3", 1e-3), ("0.5", 0.5), ("true", True), ("None", None), ("random", "random")],
)
def test_a_word_is_what_it_looks_like(word, value):
    assert parse_value(word) == value
    assert type(parse_value(word)) is type(value)
