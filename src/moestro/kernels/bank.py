"""A whole bank of feed-forward experts as one operator for CPUs, forward and backward.

    y[t] = sum over pairs p of token t:  weight[p] * f_expert(p)(x[t])

Rows are gathered, multiplied and activated a thousand at a time, so that they stay in the cache; what the bank
keeps for its backward are the pre-activations only, or nothing. The gradient of a combine weight needs no output of
an expert: `<dy, h W> = <dy W^T, h>`.

Both operators are registered with `torch.library` as `moestro::bank` and `moestro::bank_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.kernels.activate import FUSED
from moestro.kernels.matrices import Gradients, Matrices
from moestro.kernels.plan import ROUNDINGS, Chunk, Plan, make_plan, most_rows
from moestro.kernels.rows import Scratch, clear_filling, picked


@torch.library.custom_op("moestro::bank", mutates_args=(), device_types="cpu")
def bank(
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
    rounding: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run rows through their experts, and sum them per token where the routing is given.

    Products are computed in the dtype of `x`; weights of another are cast an expert at a time.

    Args:
        x: `[tokens, width]`; without `token`, `[pairs, width]` grouped by expert.
        offsets: where each expert's pairs begin, `[experts + 1]`.
        token: source of each pair, `[pairs]`.
        weight: combine weight of each pair, `[pairs]`.
        order: pairs by token, `[pairs]`; with `starts`, where each token's pairs begin, `[tokens]`. Without
            them, outputs stay rows.
        gate, up, down: `[experts, width, hidden]` twice and `[experts, hidden, width]`; no gate = a plain network.
        gate_bias, up_bias, down_bias: `[experts, hidden]` twice and `[experts, width]`, or None.
        activation: see `moestro.experts.activations`.
        rounding: `exact`, `few_sizes` or `tiles`, see `moestro.kernels.plan`.
        keep: whether to return the pre-activations, for the backward.

    Returns: y `[tokens, width]`, pre-activations of gate and up `[rows, hidden]`, empty if not kept.
    """
    first, second = Matrices(gate, gate_bias, x.dtype), Matrices(up, up_bias, x.dtype)
    third = Matrices(down, down_bias, x.dtype)
    plan, hidden = make_plan(offsets, ROUNDINGS[rounding]), up.shape[2]
    kept = most_rows(int(offsets[-1]), len(up), ROUNDINGS[rounding]) if keep else 0
    pre_gate, pre_up = x.new_empty(kept if gate is not None else 0, hidden), x.new_empty(kept, hidden)
    out = x.new_empty(plan.rows, x.shape[1])
    source = _source(plan, token)
    scratch = Scratch(x, plan)
    for chunk in plan.chunks:
        rows = picked(x, source, chunk, scratch("x", x.shape[1]))
        g, u = _pre_activations(chunk, rows, first, second, (pre_gate, pre_up) if keep else None, scratch)
        h = scratch("h", hidden)[: len(rows)]
        _activate(activation, chunk, g, u, h, h)
        third.multiply(chunk, h, out[chunk.start : chunk.stop])
    for each in (pre_gate, pre_up):
        each[plan.rows :].zero_()  # no uninitialised memory leaves an operator
    return _combined(out, plan, weight, order, starts, len(x)), pre_gate, pre_up


def _pre_activations(
    chunk: Chunk,
    rows: Tensor,
    gate: Matrices,
    up: Matrices,
    kept: tuple[Tensor, Tensor] | None,
    scratch: Scratch,
) -> tuple[Tensor | None, Tensor]:
    """The chunk's `x W_gate` and `x W_up`, in the kept tensors or in scratch."""
    if kept is None:
        pre_gate, pre_up = scratch("gate", up.columns)[: len(rows)], scratch("up", up.columns)[: len(rows)]
    else:
        pre_gate, pre_up = (each[chunk.start : chunk.stop] for each in kept)
    up.multiply(chunk, rows, pre_up)
    if not gate:
        return None, pre_up
    gate.multiply(chunk, rows, pre_gate)
    return pre_gate, pre_up


def _activate(activation: str, chunk: Chunk, gate: Tensor | None, up: Tensor, act: Tensor, out: Tensor) -> None:
    """`act(gate)` into `act` and its product with `up` into `out`; `act(up)` into both without a gate."""
    chunk.rowwise(FUSED[activation].forward, up if gate is None else gate, act)
    if gate is not None:
        torch.mul(act, up, out=out)


def _source(plan: Plan, token: Tensor | None) -> Tensor | None:
    return plan.source if token is None else plan.spread(token)


def _combined(
    rows: Tensor, plan: Plan, weight: Tensor | None, order: Tensor | None, starts: Tensor | None, tokens: int
) -> Tensor:
    """Rows as pairs, or their weighted sum per token in the order of its choices."""
    if order is None or starts is None:
        y = plan.collect(rows)
        return y if weight is None else y * weight.unsqueeze(1).to(y.dtype)
    if not len(order):
        return rows.new_zeros(tokens, rows.shape[1])
    scale = None if weight is None else weight.index_select(0, order).to(rows.dtype)
    return F.embedding_bag(plan.place_of(order), rows, starts, mode="sum", per_sample_weights=scale)


@torch.library.custom_op("moestro::bank_backward", mutates_args=(), device_types="cpu")
def bank_backward(
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
    rounding: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of `INPUTS`, those that `needs` asks for, in this order."""
    need = dict(zip(INPUTS, needs, strict=True))
    first, second = Matrices(gate, gate_bias, x.dtype), Matrices(up, up_bias, x.dtype)
    third = Matrices(down, down_bias, x.dtype)
    plan, width, hidden = make_plan(offsets, ROUNDINGS[rounding]), x.shape[1], up.shape[2]
    gradients = Gradients(
        {"gate": gate, "up": up, "down": down, "gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias},
        need,
        plan,
    )
    source, scratch = _source(plan, token), Scratch(x, plan)
    row_weight = None if weight is None else plan.spread_weight(weight)
    fill = None if row_weight is not None else plan.filling()
    grad_rows = x.new_empty(plan.rows if need["x"] else 0, width)
    grad_weight = torch.empty(plan.rows, dtype=torch.promote_types(x.dtype, torch.float32))
    kept = (pre_gate, pre_up) if len(pre_up) else None
    for chunk in plan.chunks:
        part = slice(chunk.start, chunk.stop)
        count = chunk.stop - chunk.start
        dy = picked(grad, source if order is not None else plan.source, chunk, scratch("dy", width))
        rows = picked(x, source, chunk, scratch("x", width))
        act, h, dh, du, dg = (scratch(name, hidden)[:count] for name in ("act", "h", "dh", "du", "dg"))
        if kept is None:
            g, u = _pre_activations(chunk, rows, first, second, None, scratch)
        else:
            g, u = (kept[0][part] if gate is not None else None), kept[1][part]
        _activate(activation, chunk, g, u, act, act if g is None else h)
        h = act if g is None else h
        third.multiply_transposed(chunk, dy, dh)
        if row_weight is not None:
            if need["weight"]:
                torch.sum(torch.mul(dh, h, out=du), 1, dtype=grad_weight.dtype, out=grad_weight[part])
                third.add_bias_products(chunk, dy, grad_weight[part])
            scale = row_weight[part].unsqueeze(1).to(x.dtype)
            dh.mul_(scale)
        else:
            scale = None
        if fill is not None:
            clear_filling(fill, chunk, dy, dh)
        if need["down"]:
            weighted = h if scale is None else torch.mul(h, scale, out=dg)
            gradients.add("down", chunk, weighted, dy)
        if need["down_bias"]:
            gradients.add_bias("down_bias", chunk, dy, scale)
        if g is None:
            chunk.rowwise(FUSED[activation].backward, dh, u, du)
        else:
            torch.mul(dh, act, out=du)
            chunk.rowwise(FUSED[activation].backward, dh.mul_(u), g, dg)
            gradients.add("gate", chunk, rows, dg)
            gradients.add_bias("gate_bias", chunk, dg, None)
        gradients.add("up", chunk, rows, du)
        gradients.add_bias("up_bias", chunk, du, None)
        if need["x"]:
            second.multiply_transposed(chunk, du, grad_rows[part])
            if g is not None:
                first.multiply_transposed(chunk, dg, grad_rows[part], add=True)
    found = gradients.found
    if need["x"]:
        found["x"] = _combined(grad_rows, plan, None, order, starts, len(x))
    if need["weight"] and weight is not None:
        found["weight"] = plan.collect(grad_weight).to(weight.dtype)
    return [found[name] for name in INPUTS if need[name]]


INPUTS = ("x", "weight", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@bank.register_fake
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
    rounding: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = (x if token is None else token).shape[0]  # len() would make a number of a symbol
    rows = most_rows(pairs, up.shape[0], ROUNDINGS[rounding]) if keep else 0
    return (
        x.new_empty(x.shape),
        x.new_empty(rows if gate is not None else 0, up.shape[2]),
        x.new_empty(rows, up.shape[2]),
    )


@bank_backward.register_fake
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
    rounding: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = (x, weight, gate, up, down, gate_bias, up_bias, down_bias)
    return [torch.empty_like(each) for each, need in zip(inputs, needs, strict=True) if need and each is not None]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, activation, rounding, _ = inputs
    _, pre_gate, pre_up = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(pre_gate, pre_up)
    ctx.save_for_backward(*tensors, pre_gate, pre_up)
    ctx.activation, ctx.rounding = activation, rounding


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, pre_gate, pre_up = ctx.saved_tensors
    names = ("x", "offsets", "token", "weight", "order", "starts", *INPUTS[2:])
    if grad is None:
        return (None,) * (len(names) + 3)
    wanted = {name: ctx.needs_input_grad[i] for i, name in enumerate(names)}
    needs = [wanted[name] for name in INPUTS]
    found = bank_backward(grad.contiguous(), *tensors, pre_gate, pre_up, ctx.activation, ctx.rounding, needs)
    answer = dict(zip([name for name in INPUTS if wanted[name]], found, strict=True))
    return (*(answer.get(name) for name in names), None, None, None)


bank.register_autograd(_gradients, setup_context=_remember)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "the fused bank has no second derivative; build the experts with kernel='loop' to differentiate twice"
    )


bank_backward.register_autograd(_refuse)
