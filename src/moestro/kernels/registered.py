"""A grouped product as an operator of `torch.library`: compilers see its shapes and never look inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def registered(name: str, product: Product, outer: Product) -> Product:
    """Register the two products that a back end consists of; each is the other's gradient, any number of times.

    Args:
        name: the operators become `moestro::<name>_product` and `moestro::<name>_outer`.
        product: rows `[rows, width]`, weight `[experts, width, out]`, offsets `[experts + 1]` -> `[rows, out]`.
        outer: rows `[rows, width]`, gradient `[rows, out]`, offsets -> `[experts, width, out]`, the sum over each
            group of outer products; zero for experts without rows.

    Returns: the product, differentiable.
    """
    multiply = torch.library.custom_op(f"moestro::{name}_product", product, mutates_args=())
    sum_up = torch.library.custom_op(f"moestro::{name}_outer", outer, mutates_args=())

    @multiply.register_fake
    def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return rows.new_empty(rows.shape[0], weight.shape[2])

    @sum_up.register_fake
    def _(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
        return rows.new_empty(offsets.shape[0] - 1, rows.shape[1], grad.shape[1])

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, offsets = ctx.saved_tensors
        for_rows, for_weight, _ = ctx.needs_input_grad
        return (
            multiply(grad, weight.transpose(1, 2), offsets) if for_rows else None,
            sum_up(rows, grad, offsets) if for_weight else None,
            None,
        )

    def outer_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, other, offsets = ctx.saved_tensors
        for_rows, for_other, _ = ctx.needs_input_grad
        return (
            multiply(other, grad.transpose(1, 2), offsets) if for_rows else None,
            multiply(rows, grad, offsets) if for_other else None,
            None,
        )

    multiply.register_autograd(product_gradients, setup_context=remember)
    sum_up.register_autograd(outer_gradients, setup_context=remember)
    return multiply
