"""A quantised language model: every tensor named, nothing skipped in silence, much the same text."""

import pytest
import torch
from oracles.tiny_models import tiny_model, tokens_for

from moestro.experts import QuantisedExperts, QuantisedLinear
from moestro.inference import generate, quantise_model
from moestro.inference.quantise import KEPT


@pytest.mark.parametrize(("bits", "far"), [(8, 0.05), (4, 0.5)])
def test_every_map_and_bank_is_quantised_and_listed(bits, far):
    model = tiny_model("olmoe")
    tokens = tokens_for(model)
    with torch.inference_mode():
        before = model(tokens)
    errors = quantise_model(model, bits, group=32)
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    left = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    assert left == {"weight"}  # norms, routers and the embedding
    layers = len(model.layers)
    assert len(errors) == layers * 5 + 1
    assert [error.name for error in errors[:5]] == [
        "layers.0.attention.qkv.weight",
        "layers.0.attention.output.weight",
        "layers.0.moe.experts.gate",
        "layers.0.moe.experts.up",
        "layers.0.moe.experts.down",
    ]
    assert errors[-1].name == "head.weight"
    with torch.inference_mode():
        after = model(tokens)
    assert float((after - before).norm() / before.norm()) < far
    assert len(list(generate(model, [1, 2, 3], 10))) == 10


def test_what_cannot_be_quantised_must_be_named():
    model = tiny_model("hypermoe")  # its experts come with a network that makes them
    with pytest.raises(ValueError, match=r"would stay in float: layers\.0\.moe"):
        quantise_model(model)
    assert not any(isinstance(module, QuantisedExperts | QuantisedLinear) for module in model.modules())
    quantise_model(model, keep=[*KEPT, "*.moe.*"])
    assert any(isinstance(module, QuantisedLinear) for module in model.modules())


def test_shared_experts_and_dense_layers_are_quantised():
    model = tiny_model("deepseek-v3", first_dense=1)
    tokens = tokens_for(model)
    with torch.inference_mode():
        before = model(tokens)
        names = [error.name for error in quantise_model(model, 8)]
        after = model(tokens)
    assert {"layers.0.ffn.gate", "layers.1.moe.shared.down"} <= set(names)
    assert float((after - before).norm() / before.norm()) < 0.05


def test_requests_that_change_nothing_are_refused():
    with pytest.raises(ValueError, match="leaves nothing to quantise"):
        quantise_model(tiny_model("olmoe"), keep=["*"])


def test_named_parts_stay_in_float():
    model = tiny_model("olmoe")
    errors = quantise_model(model, keep=["*norm.weight", "*.router.*", "embedding.weight", "head.weight"])
    assert isinstance(model.head, torch.nn.Linear)
    assert "head.weight" not in [error.name for error in errors]
