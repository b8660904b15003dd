"""The export form of a model, and its graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from moestro.export.dense import dense_run
from moestro.layers import MoE
from moestro.routing import Context

FACTS = tuple(field.name for field in fields(Context) if field.name != "previous")


def for_export(model: nn.Module) -> nn.Module:
    """A copy of a layer or model, in evaluation, whose mixtures have no shape that depends on data.

    Every bank is replaced by one that runs all experts on all tokens and combines them by a matrix (`DenseRun`);
    routers stay as they are. The outputs are the same to rounding. The original is left alone.

    Args:
        model: a `MoE`, a `DecoderLM` or any module that holds `MoE` layers.

    Raises:
        ValueError: a module without a mixture, or a bank that has no dense form, e.g. quantised experts.
    """
    form = copy.deepcopy(model).eval()
    mixtures = [module for module in form.modules() if isinstance(module, MoE)]
    if not mixtures:
        raise ValueError(
            f"{type(model).__name__} holds no mixture of experts; export it with torch.export directly"
        )
    for mixture in mixtures:
        mixture.experts = dense_run(mixture.experts)
    return form


def to_program(model: nn.Module, example: Tensor | Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """The graph of a layer or language model, for any number of tokens, sequences and any routing.

    Args:
        model: a `MoE` or a `DecoderLM`.
        example: hidden states `[tokens, width]` of a layer or token ids `[batch, length]` of a model, or a mapping
            of names to tensors: `x` and fields of `Context` for a layer, `tokens`, `valid`, `domain` for a model.
            Sizes of 2 and more, since a compiler takes a size of 1 for a constant.

    Returns: a program that takes the tensors of the example in its order.

    Raises:
        ValueError: as `for_export`; an example that does not fit; a method whose router cannot be traced: it loops
            or branches on values (optimal transport, assignment).
    """
    named = named_inputs(model, example)
    graph = _Positional(for_export(model), tuple(named))
    shapes = tuple(_dynamic(name, value) for name, value in named.items())
    with torch.no_grad():
        graph(*named.values())  # what is wrong with the example shows here, not inside a trace
        try:
            # strict, because len(x) in plain Python would make a constant of the number of tokens
            return torch.export.export(graph, tuple(named.values()), dynamic_shapes=(shapes,), strict=True)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{type(model).__name__} with the method {_methods(model)} cannot be exported: something in it "
                f"loops or branches on values ({reason}); docs/export.md lists what can"
            ) from error


class _Positional(nn.Module):
    """A layer or model that takes its inputs by position."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        if isinstance(self.model, MoE):
            x = named.pop("x")
            return self.model(x, Context(**named))
        y: Tensor = self.model(**named)
        return y


def named_inputs(model: nn.Module, example: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an example under the names that the model gives them, its main input first."""
    first, others = ("x", FACTS) if isinstance(model, MoE) else ("tokens", ("valid", "domain"))
    named = {first: example} if isinstance(example, Tensor) else dict(example)
    unknown = [name for name in named if name not in (first, *others)]
    if first not in named or unknown:
        raise ValueError(
            f"the example names {', '.join(named) or 'nothing'}; a {type(model).__name__} takes {first} "
            f"and perhaps {', '.join(others)}"
        )
    if named[first].dim() != 2 or min(named[first].shape) < 2:
        wanted = "[tokens, width]" if first == "x" else "[batch, length]"
        raise ValueError(
            f"the example's {first} has shape {list(named[first].shape)}; pass {wanted}, each size 2 or more"
        )
    return {first: named.pop(first), **named}


def _dynamic(name: str, value: Tensor) -> dict[int, Any]:
    sizes = range(1) if name == "x" else range(value.dim())
    return dict.fromkeys(sizes, torch.export.Dim.DYNAMIC)


def _methods(model: nn.Module) -> str:
    names = {module.method for module in model.modules() if isinstance(module, MoE) and module.method}
    return ", ".join(sorted(names)) or "of this layer"
