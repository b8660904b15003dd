"""Models on disk: whole, exact, in the right layout, and refused when they do not belong together."""

import json
from pathlib import Path

import pytest
import torch
from oracles.tiny_models import CAUSAL_METHODS, facts, tiny_model, tokens_for, train_a_little
from safetensors.torch import load_file, save_file

from moestro.models import choose_layout, load_model, save_model

LAYOUTS = {
    "Mixtral": {},
    "Qwen3-MoE": {"qk_norm": True, "first_dense": 1},
    "OLMoE": {"qk_norm": "full", "tied_embeddings": False},
    "DeepSeek-V3": {"method": "deepseek-v3", "first_dense": 1, "options": {"top_k": 3}},
    "Llama": {"method": None, "num_kv_heads": 2},
    "Qwen3": {"method": None, "qk_norm": "head"},
    "moestro": {"method": "switch", "activation": "relu"},
}


class Tokenizer:
    """Stands for any tokenizer that saves itself."""

    eos_id = 5

    def save(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def assert_same_model(ours, theirs):
    assert theirs.config == ours.config
    state, other = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("method", [None, *CAUSAL_METHODS])
def test_every_causal_method_comes_back_exactly(method, tmp_path):
    model = tiny_model(method)
    if method is not None:
        train_a_little(model, steps=2)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert_same_model(model, loaded)
    tokens = tokens_for(model)
    assert not loaded.training
    assert torch.equal(loaded(tokens, **facts(tokens)), model(tokens, **facts(tokens)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_goes_into_the_layout_that_computes_it(layout, tmp_path):
    model = tiny_model(**LAYOUTS[layout])
    saved = save_model(model, tmp_path / "model", Tokenizer())
    assert (saved.layout, saved.stock) == (layout, layout != "moestro")
    assert {path.name for path in saved.folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    config = json.loads((saved.folder / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (5, None)
    assert_same_model(model, load_model(saved.folder))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"first_dense": 1}, "not Mixtral: Mixtral has no dense layers but layers [0] are"),
        ({"activation": "relu"}, "gated feed-forward networks, not relu"),
        ({"attention": "latent"}, "attention is grouped-query, not latent"),
        ({"qk_norm": "full", "head_dim": 6}, "not OLMoE: its heads fill the width 32, not 4 x 6"),
        ({"method": "switch"}, "Mixtral routes by softmax and top-k, weights normalised to one"),
        ({"method": "olmoe"}, "Mixtral routes by softmax and top-k, weights normalised to one"),
        ({"method": "shazeer-noisy-topk", "qk_norm": True}, "Qwen3-MoE routes by softmax and top-k"),
        ({"method": "mixtral", "attention": "latent"}, "DeepSeek-V3 routes by biased sigmoid scores and top-k"),
        ({"method": "deepseek-v3", "every": 2}, "dense layers come first, but layers [0, 2] are dense"),
        ({"method": "deepseek-v3", "options": {"shared_experts": 0}}, "pass shared_experts >= 1"),
        (
            {"method": "deepseek-v3", "attention": "grouped-query", "qk_norm": "full"},
            "attention is latent, not grouped-query",
        ),
        ({"method": "deepseek-v3", "options": {"top_k": 2, "num_groups": 8, "groups_kept": 4}}, "each needs two"),
    ],
)
def test_what_no_stock_layout_computes_says_why(arguments, reason, tmp_path):
    saved = save_model(tiny_model(**arguments), tmp_path / "model")
    assert (saved.layout, saved.stock) == ("moestro", False)
    assert reason in saved.reason
    load_model(saved.folder)


def test_a_bfloat16_model_stays_one(tmp_path):
    model = tiny_model("deepseek-v3").bfloat16()
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.embedding.weight.dtype == torch.bfloat16
    assert_same_model(model, loaded)


def test_saving_again_replaces_the_model(tmp_path):
    save_model(tiny_model(), tmp_path / "model", Tokenizer())
    other = tiny_model("switch")
    save_model(other, tmp_path / "model")
    assert_same_model(other, load_model(tmp_path / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_what_was_there(tmp_path):
    class Failing(Tokenizer):
        def save(self, folder):
            raise OSError("disk full")

    model = tiny_model()
    save_model(model, tmp_path / "model")
    with pytest.raises(OSError, match="disk full"):
        save_model(tiny_model("switch"), tmp_path / "model", Failing())
    assert_same_model(model, load_model(tmp_path / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is not a model folder"):
        save_model(tiny_model(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: edit_config(f, moestro=None), "was not written by moestro"),
        (lambda f: edit_config(f, moestro={"format": 99}), "format 99 but this moestro reads format 1"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"1234567890"), "is damaged"),
        (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), "lacks 1 tensors, among them model.norm"),
        (
            lambda f: edit_tensors(f, lambda t: t.update(more=torch.zeros(1))),
            "has unknown 1 tensors, among them more",
        ),
        (lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(3)})), r"shape \[3\]"),
    ],
)
def test_damaged_folders_are_refused(damage, message, tmp_path):
    save_model(tiny_model(), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("attention_bias", "qkv"),
        ("attention_bias", "all"),
        ("attention_scale", 0.3),
        ("windows", [4, None, 4]),
        ("sinks", True),
        ("head_bias", True),
        ("expert_bias", True),
        ("rope_order", "pairs"),
        ("rope_dim", 2),
        ("norm", "layer"),
        ("norm_place", "after"),
        ("norm_place", "both"),
        ("embedding_scale", 2.0),
        ("residual_scale", 0.5),
        ("logit_divisor", 2.0),
        ("qk_norm", "rotated"),
    ],
)
def test_what_a_layout_cannot_say_is_not_written_in_it(argument, value, tmp_path):
    """Whatever layout is chosen, its words describe this model: read back from them, it computes the same."""
    model = tiny_model("mixtral", num_layers=3, **{argument: value})
    train_a_little(model, steps=1)
    layout = choose_layout(model).layout
    assert layout.name not in ("Mixtral", "Qwen3-MoE", "OLMoE")
    assert layout.says is None or argument in layout.says
    save_model(model, tmp_path / "model")
    tokens = tokens_for(model)
    assert torch.equal(load_model(tmp_path / "model")(tokens), model.eval()(tokens))
