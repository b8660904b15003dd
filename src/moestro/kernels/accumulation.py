"""Gradients that a backward may add to where they lie, in place of handing autograd others to add."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def existing_gradients(parameters: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The `.grad` of parameters if autograd would only add to each, in place, what the running backward returns.

    Empty if one has no gradient yet (the first micro-batch writes it), is watched by a hook or is no leaf; and
    under `create_graph`, in `torch.autograd.grad` and in a graph that a compiler traces. Hooks of C++ on the node
    that accumulates, such as those of DistributedDataParallel, cannot be seen from here.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return {}
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if parameter is None or not parameter.is_leaf or parameter.grad is None or not _only_adds(parameter):
            return {}
        found[name] = parameter.grad
    return found


def _only_adds(parameter: Tensor) -> bool:
    grad = parameter.grad
    assert grad is not None
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return False
    if grad.layout != torch.strided or grad.requires_grad or grad.dtype != parameter.dtype:
        return False
    return type(grad) is Tensor and _will_accumulate(parameter)


def _will_accumulate(parameter: Tensor) -> bool:
    """Whether the running backward ends in the parameter's `.grad`: not if it asks for other leaves only."""
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(parameter).node))
    except RuntimeError:  # how torch answers in `torch.autograd.grad`
        return False
