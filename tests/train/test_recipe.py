"""A recipe is read exactly or refused in one sentence that says where the mistake is."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.train.recipe import Recipe, RecipeError, TrainSection, dump_recipe, load_recipe, shipped_recipes


@pytest.fixture
def recipe(tmp_path):
    """Writes the text as a recipe and reads it; the dense model needs no method, hence no torch."""

    def read(text, overrides=None):
        (tmp_path / "r.yaml").write_text(text)
        return load_recipe(tmp_path / "r.yaml", overrides)

    return read


DENSE = "model: {method: null}\n"


def test_values_come_from_the_file_and_the_rest_from_the_schema(recipe):
    r = recipe(DENSE + "seed: 7\ntrain:\n  steps: 5\n  learning_rate: 1e-3\n")
    assert (r.seed, r.train.steps, r.train.learning_rate) == (7, 5, 1e-3)
    assert r.train.batch_size == TrainSection().batch_size


def test_overrides_may_be_nested_or_dotted_and_win(recipe):
    r = recipe(
        DENSE + "train: {steps: 5, clip: 2}\n", {"train": {"steps": 6}, "train.warmup_fraction": 0, "seed": 3}
    )
    assert (r.train.steps, r.train.clip, r.train.warmup_fraction, r.seed) == (6, 2.0, 0, 3)


def test_another_method_leaves_the_options_of_the_first_behind(recipe):
    text = "model: {method: mixtral, options: {balance: 0.5, top_k: 1}}\n"
    assert recipe(text, {"model.method": "switch"}).model.options == {}
    assert recipe(text, {"model.method": "mixtral"}).model.options == {"balance": 0.5, "top_k": 1}
    assert recipe(text, {"model.options.top_k": 3}).model.options == {"balance": 0.5, "top_k": 3}
    assert recipe(text, {"model": {"method": "switch", "options": {"jitter": 0.1}}}).model.options == {
        "jitter": 0.1
    }


def test_an_option_such_as_1e_2_is_a_number_and_not_a_text():
    from moestro.train.yaml_source import _Loader

    loader = _Loader("[1e-2, 1E3, -2e+4, .5e1, 1_0.5e-1, 1e, e3, 2024-01-01]")
    assert loader.get_single_data() == [0.01, 1000.0, -2e4, 5.0, 1.05, "1e", "e3", "2024-01-01"]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("model:\n  method: null\n  num_expert: 8\n", 3, "unknown key model.num_expert; did you mean num_experts?"),
        ("seed: 1\nsteps: 5\n", 2, "unknown key steps; did you mean train.steps?"),
        ("zzz: 1\n", 1, "unknown key zzz; a recipe takes seed, twin, model, data, train"),
        ("train:\n\n  steps: abc\n", 3, "train.steps: expected a whole number, not 'abc'"),
        ("train:\n  steps: 1.5\n", 2, "train.steps: expected a whole number, not 1.5"),
        ("train:\n  steps: 0\n", 2, "train.steps: expected a value greater than or equal to 1, not 0"),
        ("train:\n  steps: yes\n", 2, "train.steps: neither true nor false"),
        ("train:\n  learning_rate: .nan\n", 2, "train.learning_rate: expected a value"),
        ("train:\n  schedule: cosin\n", 2, "expected cosine, wsd or constant, not 'cosin'; did you mean cosine?"),
        ("train: 3\n", 1, "train: expected a mapping, not 3"),
        ("data:\n  paths: [a, [b]]\n", 2, "data.paths.1: expected a text"),
        ("seed: 1\nseed: 2\n", 2, "the key 'seed' is given twice (first in line 1)"),
        ("model: &a {width: 4}\ndata: *a\n", 2, "an alias (*a) is not allowed"),
        ("seed: !!python/object/apply:os.system [ls]\n", 1, "could not determine a constructor"),
        ("seed: [1\n", 2, "expected ',' or ']'"),
        ("train:\n  batch_size: 6\n  accumulate: 4\n", 1, "batch_size that is a multiple of 4"),
        ("parallel: {shard_dense: true}\ntrain: {compile: true}\n", 1, "train.compile does not know a dense part"),
        ("model:\n  method: null\n  options: {top_k: 2}\n", 3, "model.options needs a model.method"),
    ],
)
def test_mistakes_name_file_line_and_remedy(recipe, text, line, message):
    with pytest.raises(RecipeError) as caught:
        recipe(text)
    assert f"r.yaml:{line}: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n", "word\n", "\x00\n", "a" * (1 << 20) + "\n", "[" * 3000 + "]" * 3000])
def test_what_is_no_recipe_is_refused(recipe, text):
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        recipe(text)


def test_a_mistake_in_an_override_names_the_flag(recipe):
    with pytest.raises(RecipeError, match=r"^--train\.steps: train\.steps: expected a whole number, not 'abc'"):
        recipe(DENSE + "train: {steps: 5}\n", {"train.steps": "abc"})
    with pytest.raises(RecipeError, match=r"^--train\.stpes: unknown key train\.stpes; did you mean steps\?"):
        recipe(DENSE, {"train": {"stpes": 3}})


def test_unknown_methods_and_options_get_a_suggestion(recipe):
    with pytest.raises(RecipeError, match=r"r\.yaml:2: unknown method 'mixtrall'; did you mean mixtral\?"):
        recipe("model:\n  method: mixtrall\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:4: mixtral has no option 'topk'; did you mean top_k\?"):
        recipe("model:\n  method: mixtral\n  options:\n    topk: 2\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:4: mixtral option top_k='two': .*expected int"):
        recipe("model:\n  method: mixtral\n  options:\n    top_k: two\n")
    with pytest.raises(RecipeError, match=r"^--model\.options\.topk: mixtral has no option"):
        recipe("model:\n  method: mixtral\n", {"model": {"options": {"topk": 2}}})


def test_a_missing_file_lists_what_is_shipped(tmp_path):
    with pytest.raises(
        RecipeError, match=r"no recipe at .*firts\.yaml; shipped recipes: first.*did you mean first\?"
    ):
        load_recipe(tmp_path / "firts.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


def test_the_default_recipe_is_the_shipped_one():
    assert "first" in shipped_recipes()
    assert load_recipe() == load_recipe("first") == load_recipe(shipped_recipes()["first"])


@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**31),
            "train": st.fixed_dictionaries(
                {},
                optional={
                    "learning_rate": st.floats(1e-300, 1e300),
                    "schedule": st.sampled_from(["cosine", "wsd", "constant"]),
                    "weight_decay": st.floats(0, 1e9),
                },
            ),
            "data": st.fixed_dictionaries({}, optional={"paths": st.lists(st.text()), "tokenizer": st.text()}),
        },
    )
)
def test_a_dumped_recipe_reads_back_equal(tmp_path_factory, values):
    recipe = Recipe.model_validate({**values, "model": {"method": None}})
    path = tmp_path_factory.mktemp("r") / "r.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_the_schema_needs_no_torch():
    code = "import sys, moestro.train, moestro.train.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
