"""A whole bank of feed-forward experts in Triton, forward and backward.

    y[t] = sum over pairs p of token t:  weight[p] * f_expert(p)(x[t])

Three passes forward: gather, products and activation; the product with W_down; the weighted sum per token, by the
inverse permutation. Nothing is padded; no float is added atomically, so the bits are the same at every repetition;
where every token has the same number of choices the host never waits for the device. What is kept for the backward
are the pre-activations, or nothing. Products accumulate in float32.

Registered with `torch.library` as `moestro::triton_bank` and `moestro::triton_bank_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moestro.kernels.triton.launch import Launch
from moestro.kernels.triton.settings import SETTINGS

INPUTS = ("x", "weight", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")
NAMES = ("x", "offsets", "token", "weight", "order", "starts", *INPUTS[2:])


@torch.library.custom_op("moestro::triton_bank", mutates_args=())
def triton_bank(
    x: Tensor,
    offsets: Tensor,
    token: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    starts: Tensor | None,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    setting: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run rows through their experts, and sum them per token where the routing is given.

    Args:
        x: `[tokens, width]`; without `token`, `[pairs, width]` grouped by expert.
        offsets: where each expert's pairs begin, `[experts + 1]`.
        token: source of each pair, `[pairs]`.
        weight: combine weight of each pair, `[pairs]`; used with `order` only.
        order: pairs by token, `[pairs]`; with `starts`, where each token's pairs begin, `[tokens]`. Without
            them, outputs stay rows.
        gate, up, down: `[experts, width, hidden]` twice and `[experts, hidden, width]`, of the dtype of x and any
            strides; no gate = a plain network.
        gate_bias, up_bias, down_bias: `[experts, hidden]` twice and `[experts, width]`, or all None.
        activation: see `moestro.experts.activations`.
        setting: tile sizes, see `moestro.kernels.triton.settings`.
        keep: whether to return the pre-activations, for the backward.

    Returns: y `[tokens, width]`, pre-activations of gate and up `[pairs, hidden]`, empty if not kept.
    """
    pairs, hidden = len(x if token is None else token), up.shape[2]
    token, weight, order, starts = _contiguous(token, weight, order, starts)
    launch = Launch(x, offsets, pairs, SETTINGS[setting])
    kept = pairs if keep else 0
    pre_gate, pre_up = launch.empty(0 if gate is None else kept, hidden), launch.empty(kept, hidden)
    h = launch.empty(pairs, hidden)
    saved = (None if gate is None else pre_gate, pre_up) if keep else (None, None)
    launch.hidden_units(x, token, gate, up, (gate_bias, up_bias), activation, saved, h)
    y = launch.product(h, down, bias=down_bias)
    if order is not None and starts is not None:
        y = launch.combine(y, weight, order, starts)
    return y, pre_gate, pre_up


@torch.library.custom_op("moestro::triton_bank_backward", mutates_args=())
def triton_bank_backward(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    token: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    starts: Tensor | None,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre_gate: Tensor,
    pre_up: Tensor,
    activation: str,
    setting: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of `INPUTS`, those that `needs` asks for, in this order."""
    need = dict(zip(INPUTS, needs, strict=True))
    pairs, hidden = len(x if token is None else token), up.shape[2]
    token, weight, order, starts = _contiguous(token, weight, order, starts)
    launch = Launch(x, offsets, pairs, SETTINGS[setting])
    if not len(pre_up) and pairs:
        pre_gate, pre_up = launch.empty(0 if gate is None else pairs, hidden), launch.empty(pairs, hidden)
        kept = (None if gate is None else pre_gate, pre_up)
        launch.hidden_units(x, token, gate, up, (gate_bias, up_bias), activation, kept)
    y_token = None if order is None else token  # without an order, y has a row per pair
    grad_gate, grad_up, weighted, grad_weight = launch.hidden_gradients(
        grad, y_token, down, down_bias, weight, (None if gate is None else pre_gate, pre_up), activation,
        need["weight"], need["down"],
    )  # fmt: skip
    found: dict[str, Tensor] = {}
    if need["x"]:
        second = None if gate is None or grad_gate is None else (grad_gate, gate.transpose(1, 2))
        rows = launch.product(grad_up, up.transpose(1, 2), second)
        found["x"] = rows if order is None or starts is None else launch.combine(rows, None, order, starts)
    if need["weight"] and weight is not None and grad_weight is not None:
        found["weight"] = grad_weight.to(weight.dtype)
    for name, matrix, a, b, a_token, b_token in (
        ("gate", gate, x, grad_gate, token, None),
        ("up", up, x, grad_up, token, None),
        ("down", down, weighted, grad, None, y_token),
    ):
        if need[name] and matrix is not None and a is not None and b is not None:
            found[name] = torch.empty_like(matrix)
            launch.weight_gradient(a, b, found[name], a_token, b_token)
    for name, bias, each, each_token, scale in (
        ("gate_bias", gate_bias, grad_gate, None, None),
        ("up_bias", up_bias, grad_up, None, None),
        ("down_bias", down_bias, grad, y_token, weight),
    ):
        if need[name] and bias is not None and each is not None:
            found[name] = torch.empty_like(bias, memory_format=torch.contiguous_format)
            launch.bias_gradient(each, found[name], each_token, scale)
    return [found[name] for name in INPUTS if need[name]]


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """What the kernels read element by element."""
    return [None if each is None else each.contiguous() for each in vectors]


@triton_bank.register_fake
def _(
    x: Tensor,
    offsets: Tensor,
    token: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    starts: Tensor | None,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    setting: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = (x if token is None else token).shape[0]  # len() would make a number of a symbol
    kept = pairs if keep else 0
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if gate is None else kept, up.shape[2]),
        x.new_empty(kept, up.shape[2]),
    )


@triton_bank_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    token: Tensor | None,
    weight: Tensor | None,
    order: Tensor | None,
    starts: Tensor | None,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre_gate: Tensor,
    pre_up: Tensor,
    activation: str,
    setting: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = (x, weight, gate, up, down, gate_bias, up_bias, down_bias)
    return [
        torch.empty_like(each) if each.dim() == 3 else each.new_empty(each.shape)
        for each, need in zip(inputs, needs, strict=True)
        if need and each is not None
    ]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, activation, setting, _ = inputs
    _, pre_gate, pre_up = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(pre_gate, pre_up)
    ctx.save_for_backward(*tensors, pre_gate, pre_up)
    ctx.activation, ctx.setting = activation, setting


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (len(NAMES) + 3)
    wanted = dict(zip(NAMES, ctx.needs_input_grad, strict=False))
    needs = [wanted[name] for name in INPUTS]
    found = triton_bank_backward(grad, *ctx.saved_tensors, ctx.activation, ctx.setting, needs)
    answer = dict(zip([name for name in INPUTS if wanted[name]], found, strict=True))
    return (*(answer.get(name) for name in NAMES), None, None, None)


triton_bank.register_autograd(_gradients, setup_context=_remember)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "the Triton bank has no second derivative; build the experts with kernel='loop' to differentiate twice"
    )


triton_bank_backward.register_autograd(_refuse)
