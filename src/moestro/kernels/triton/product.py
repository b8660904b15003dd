"""The grouped product alone, registered with `torch.library` as `moestro::triton_product`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moestro.kernels.triton.launch import Launch
from moestro.kernels.triton.settings import SETTINGS, setting_for


def grouped_product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`y[i] = rows[i] @ weight[e]`. Shapes: `[rows, width]`, `[experts, width, out]` -> `[rows, out]`."""
    y: Tensor = triton_product(rows, weight, offsets, setting_for(rows.shape[0], weight.shape[0]))
    return y


@torch.library.custom_op("moestro::triton_product", mutates_args=())
def triton_product(rows: Tensor, weight: Tensor, offsets: Tensor, setting: str) -> Tensor:
    """Each group of rows times the matrix of its expert."""
    return Launch(rows, offsets, len(rows), SETTINGS[setting]).product(rows, weight)


@torch.library.custom_op("moestro::triton_outer", mutates_args=())
def triton_outer(rows: Tensor, grad: Tensor, offsets: Tensor, setting: str) -> Tensor:
    """The sum of outer products of each group, `[experts, width, out]`: the gradient of the matrices."""
    out = rows.new_empty(len(offsets) - 1, rows.shape[1], grad.shape[1])
    Launch(rows, offsets, len(rows), SETTINGS[setting]).weight_gradient(rows, grad, out)
    return out


@triton_product.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor, setting: str) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@triton_outer.register_fake
def _(rows: Tensor, grad: Tensor, offsets: Tensor, setting: str) -> Tensor:
    return rows.new_empty(offsets.shape[0] - 1, rows.shape[1], grad.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.setting = inputs
    ctx.save_for_backward(*tensors)


def _product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, offsets = ctx.saved_tensors
    for_rows, for_weight = ctx.needs_input_grad[:2]
    return (
        triton_product(grad, weight.transpose(1, 2), offsets, ctx.setting) if for_rows else None,
        triton_outer(rows, grad, offsets, ctx.setting) if for_weight else None,
        None,
        None,
    )


def _outer_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, other, offsets = ctx.saved_tensors
    return (
        triton_product(other, grad.transpose(1, 2), offsets, ctx.setting),
        triton_product(rows, grad, offsets, ctx.setting),
        None,
        None,
    )


triton_product.register_autograd(_product_gradients, setup_context=_remember)
triton_outer.register_autograd(_outer_gradients, setup_context=_remember)
