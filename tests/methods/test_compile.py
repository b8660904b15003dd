"""Layers compile whole: no graph break, and one graph for every number of tokens, which computes the same."""

from collections.abc import Callable

import pytest
import torch
from methods.test_conformance import METHODS, context, fits, make
from torch.fx import GraphModule

from moestro.experts import all_kernels
from moestro.methods import Method

# what torch does itself while it traces an autograd function
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
EVERY = [method for method in METHODS if method.causal and method.family == "token-choice"]
# One of each kind of part; the nightly run has them all.
SMALL = {
    "deepseek-v3",
    "dynamic-top-p",
    "expert-gate",
    "hypermoe",
    "llama4",
    "mixtral",
    "moe-plus-plus",
    "peer",
    "shazeer-hierarchical",
    "switch",
    "task-moe",
    "yuan-attention-router",
}


def methods_for_tests(methods: list[Method], small: set[str] = SMALL) -> list[object]:
    """A few methods, and the others for the nightly run."""
    return [
        pytest.param(method, id=method.name, marks=() if method.name in small else pytest.mark.nightly)
        for method in methods
    ]


def check_one_graph(method: Method, training: bool, kernel: str = "auto") -> None:
    torch._dynamo.reset()
    num_experts = 6 if fits(method, 6) else 4
    layer = make(method, num_experts, width=8, kernel=kernel, dtype=torch.float32).train(training)
    graphs: list[GraphModule] = []

    def record(graph: GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=record)
    for num_tokens in range(3, 23):
        x, facts = torch.randn(num_tokens, 8), context(num_tokens, num_experts=num_experts)
        for tensor in (x, facts.token_ids, facts.sequence, facts.position, facts.domain):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.manual_seed(num_tokens)
        y = compiled(x, facts)
        torch.manual_seed(num_tokens)
        torch.testing.assert_close(y, layer(x, facts), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1, f"{len(graphs)} graphs for 20 numbers of tokens"


@pytest.mark.parametrize("method", methods_for_tests(EVERY))
def test_evaluation_compiles_into_one_graph(method: Method) -> None:
    check_one_graph(method, training=False)


@pytest.mark.parametrize("method", methods_for_tests(EVERY, {"gating-dropout"}))
def test_training_compiles_into_one_graph(method: Method) -> None:
    check_one_graph(method, training=True)


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.nightly), True])
@pytest.mark.parametrize("kernel", [name for name in all_kernels("cpu") if name != "auto"])
def test_back_ends_compile_into_one_graph(kernel: str, training: bool) -> None:
    (mixtral,) = [method for method in METHODS if method.name == "mixtral"]
    check_one_graph(mixtral, training, kernel)


def test_gradients_of_a_compiled_layer_are_those_of_the_layer() -> None:
    (mixtral,) = [method for method in METHODS if method.name == "mixtral"]
    layer = make(mixtral, 6, width=8, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for num_tokens in (5, 11):
        x = torch.randn(num_tokens, 8)
        torch._dynamo.mark_dynamic(x, 0)
        found = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()))
        wanted = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
