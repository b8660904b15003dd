"""Quantised models on disk: they come back bit for bit, also as codes of another processor would."""

import json

import pytest
import torch
from oracles.tiny_models import tiny_model, tokens_for
from safetensors.torch import load_file, save_file

from moestro.experts import QuantisedExperts, QuantisedFeedForward, QuantisedLinear
from moestro.inference import generate, quantise_model
from moestro.kernels.packed import unpack_codes
from moestro.models import load_model, save_model
from moestro.models.unwritten import unwritten_parameters

MODELS = {
    "olmoe": {"method": "olmoe"},
    "tied and plain": {"method": "mixtral", "activation": "relu", "tied_embeddings": True},
    "shared and dense": {"method": "deepseek-v3", "first_dense": 1, "options": {"top_k": 3}},
    "dense": {"method": None, "tied_embeddings": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_quantised_model_comes_back_bit_for_bit(name, bits, dtype, tmp_path):
    model = tiny_model(**MODELS[name]).to(dtype)
    quantise_model(model, bits, group=32)
    saved = save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert (saved.layout, saved.stock) == ("moestro", False)
    state, other = model.state_dict(), loaded.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype for key in state)
    tokens = tokens_for(model)
    with torch.inference_mode():
        assert torch.equal(loaded(tokens), model(tokens))
    assert list(generate(loaded, [1, 2, 3], 12)) == list(generate(model, [1, 2, 3], 12))


def test_files_hold_four_bit_codes_in_plain_order(tmp_path):
    model = tiny_model("olmoe")
    quantise_model(model, 4, group=32)
    save_model(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = "layers.1.moe.experts.down"
    stack = model.get_submodule(name)
    stored = tensors[f"{name}.code"]
    for expert in range(stack.num):
        codes = unpack_codes(stack.code[expert]) + 8  # [in, out]
        for i, o in ((0, 0), (1, 0), (7, 3), (30, 31)):
            byte = int(stored[expert, o, i // 2])
            assert (byte >> 4 if i % 2 else byte & 15) == int(codes[i, o])


def test_parameters_stay_unwritten_and_buffers_do_not():
    with unwritten_parameters():
        parameter, buffer = torch.nn.Parameter(torch.zeros(50)), torch.zeros(50)
        with torch.no_grad():
            parameter.normal_()
            parameter.add_(1)
            torch.nn.init.normal_(parameter)
            buffer.normal_()
        linear = torch.nn.Linear(3, 3)
    assert not parameter.any()
    assert buffer.all()
    torch.nn.init.ones_(linear.weight)
    assert linear.weight.sum() == 9


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.update({"layers.9.moe.experts": {"bits": 8, "group": 64}}), "has no such part"),
        (lambda parts: parts.update({"norm": {"bits": 8, "group": 64}}), "has no such part"),
        (lambda parts: parts["head"].pop("group"), "must say bits and group of head"),
        (lambda parts: parts["head"].update(bits=3), "8 or 4 bits"),
        (lambda parts: parts["head"].update(bits=4), "among them head.matrix.row_scale"),
        (lambda parts: parts.pop("head"), "head"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change, message, tmp_path):
    model = tiny_model("olmoe", tied_embeddings=False)
    quantise_model(model, 8)
    save_model(model, tmp_path / "model")
    config = config_of(tmp_path / "model")
    change(config["moestro"]["quantised"])
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")


def test_a_damaged_file_is_refused(tmp_path):
    model = tiny_model("olmoe")
    quantise_model(model, 8)
    save_model(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["layers.0.moe.experts.up.code"] = tensors["layers.0.moe.experts.up.code"][:4].clone()
    save_file(tensors, path)
    with pytest.raises(ValueError, match="do not belong together"):
        load_model(tmp_path / "model")


def test_every_kind_of_part_is_replaced():
    model = tiny_model("deepseek-v3", first_dense=1, options={"top_k": 3})
    quantise_model(model, 8)
    kinds = {type(module) for module in model.modules()}
    assert {QuantisedExperts, QuantisedFeedForward, QuantisedLinear} <= kinds
    with pytest.raises(ValueError, match="quantised already"):
        quantise_model(model, 4)
