"""Exported graphs serve any number of tokens and any routing, and leave the original alone."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from methods.test_compile import EVERY, methods_for_tests
from methods.test_conformance import METHODS, context, fits, make
from torch import Tensor
from torch.testing import assert_close

import moestro
from moestro.experts import quantise
from moestro.export import for_export, to_onnx, to_program
from moestro.layers import MoE
from moestro.methods import Method
from moestro.routing import Context

# what torch and its ONNX exporter do themselves
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnx_ir"),
]
ONNX_SMALL = {"deepseek-v3", "dynamic-top-p", "llama4", "mixtral", "switch", "uni-perceiver-moe"}
TOKEN_COUNTS = (2, 5, 13, 40, 600)  # the last beyond what quicker ways for few tokens or scores ask for


def layer_of(method: Method) -> MoE:
    return make(method, 6 if fits(method, 6) else 4, width=8, dtype=torch.float32).eval()


def inputs(layer: MoE, num_tokens: int, seed: int = 1) -> dict[str, Tensor]:
    facts = vars(context(num_tokens, num_experts=layer.router.num_experts))
    x = torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(seed))
    return {"x": x, **{name: value for name, value in facts.items() if value is not None}}


def outputs(layer: torch.nn.Module, named: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        y: Tensor = layer(named["x"], Context(**{name: value for name, value in named.items() if name != "x"}))
    return y


def in_onnx_runtime(path: Path, named: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    asked = [each.name for each in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: named[name].numpy() for name in asked})[0])


@pytest.mark.parametrize("method", methods_for_tests(EVERY))
def test_the_export_form_computes_the_same(method: Method) -> None:
    layer = layer_of(method)
    form = for_export(layer)
    for num_tokens in TOKEN_COUNTS:
        named = inputs(layer, num_tokens)
        assert_close(outputs(form, named), outputs(layer, named), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", methods_for_tests(EVERY, {"mixtral"}))
def test_a_program_serves_other_routings(method: Method) -> None:
    layer = layer_of(method)
    program = to_program(layer, inputs(layer, 7)).module()
    for num_tokens in TOKEN_COUNTS:
        named = inputs(layer, num_tokens)
        assert_close(program(*named.values()), outputs(layer, named), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", methods_for_tests(EVERY, ONNX_SMALL))
def test_onnx_runtime_agrees_on_other_routings(method: Method, tmp_path: Path) -> None:
    layer = layer_of(method)
    path = to_onnx(layer, tmp_path / "layer.onnx", inputs(layer, 7, seed=0))
    assert [file.name for file in tmp_path.iterdir()] == ["layer.onnx"]
    for num_tokens in TOKEN_COUNTS:
        named = inputs(layer, num_tokens)
        wanted = outputs(layer, named)  # the adapters of hypermoe are large here, so that 1e-4 is of the largest
        assert_close(in_onnx_runtime(path, named), wanted, rtol=1e-4, atol=1e-4 * max(1, wanted.abs().max().item()))


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_a_language_model_runs_in_onnx_runtime_on_other_lengths(name: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "width": 16, "num_layers": 2, "num_heads": 2, "num_experts": 4, "expert_hidden": 8}
    model = moestro.build_language_model(method=name, options={"top_k": 2}, seed=3, **sizes).eval()
    path = to_onnx(model, tmp_path / "model.onnx", torch.randint(32, (2, 7)))
    for shape in ((2, 7), (3, 5), (2, 19)):
        tokens = torch.randint(32, shape)
        with torch.no_grad():
            wanted = model(tokens)
        assert_close(in_onnx_runtime(path, {"tokens": tokens}), wanted, rtol=1e-4, atol=1e-4)


def test_ties_go_to_the_lowest_expert_in_onnx_runtime(tmp_path: Path) -> None:
    (mixtral,) = [method for method in METHODS if method.name == "mixtral"]
    layer = layer_of(mixtral)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.zero_()
    path = to_onnx(layer, tmp_path / "layer.onnx", torch.randn(7, 8))
    x = torch.randn(11, 8)
    assert_close(in_onnx_runtime(path, {"x": x}), outputs(layer, {"x": x}), rtol=1e-4, atol=1e-4)


def test_the_original_is_left_alone() -> None:
    (switch,) = [method for method in METHODS if method.name == "switch"]
    layer = layer_of(switch).train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    form = for_export(layer)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.zero_()
    assert layer.training
    assert not form.training
    assert_close(dict(layer.state_dict()), before)


def test_what_cannot_be_exported_says_so() -> None:
    layer = moestro.build("mixtral", width=32, hidden=32, num_experts=4)
    with pytest.raises(ValueError, match="holds no mixture"):
        for_export(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="takes x and perhaps token_ids"):
        to_program(layer, {"tokens": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="each size 2 or more"):
        to_program(layer, torch.zeros(1, 32))
    layer.experts, _ = quantise(layer.experts)
    with pytest.raises(ValueError, match="QuantisedExperts cannot be exported"):
        for_export(layer)


@pytest.mark.parametrize("name", ["expert-choice", "soft-moe", "smear"])
def test_routers_without_choices_by_tokens_say_so(name: str) -> None:
    (method,) = [each for each in METHODS if each.name == name]
    layer = layer_of(method)
    with pytest.raises(ValueError, match="every token chooses experts can be exported"):
        to_program(layer, inputs(layer, 8))
