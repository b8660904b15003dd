"""A whole bank of feed-forward experts as one operator for CPUs, forward and backward.

    y[t] = sum over pairs p of token t:  weight[p] * f_expert(p)(x[t])

Rows are gathered, multiplied and activated a chunk at a time, so that they stay in the cache, and every thread
takes the next chunk. What the bank keeps for its backward are the pre-activations only, or nothing.

The operators are registered with `torch.library` as `moestro::bank`, `moestro::bank_backward` and, for a backward
that adds to earlier gradients of the parameters, `moestro::bank_backward_into`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moestro.kernels.accumulation import existing_gradients
from moestro.kernels.arguments import EARLIER, LEARNING, PARAMETERS, SCHEMA, Arguments
from moestro.kernels.backward import Backward
from moestro.kernels.call import Call, kept_shape
from moestro.kernels.plan import Chunk
from moestro.kernels.queues import run_chunks
from moestro.kernels.rows import Scratch


@torch.library.custom_op(
    "moestro::bank",
    mutates_args=(),
    device_types="cpu",
    schema=f"({SCHEMA}, bool keep, bool accumulate) -> (Tensor, Tensor)",
)
def bank(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run rows through their experts, and sum them per token where the routing is given.

    Args: those of `Arguments`, and `keep`: whether to return the pre-activations, for the backward; `accumulate`:
    whether the backward may add to the `.grad` of parameters itself, see `existing_gradients`.

    Returns: y `[tokens, width]`, pre-activations `[rows, hidden]` or, gate before up, `[rows, 2 hidden]`; without
    rows if not kept.
    """
    given, keep = Arguments(*arguments[:-2]), arguments[-2]
    call = Call(given)
    kept = given.x.new_empty(kept_shape(given) if keep else (0, call.inner.columns))
    out = given.x.new_empty(call.plan.rows, call.width)

    def work(chunk: Chunk, scratch: Scratch) -> None:
        rows, h = call.rows(chunk, scratch("x", chunk)), scratch("h", chunk)
        inner = kept[chunk.start : chunk.stop] if keep else scratch("inner", chunk)
        call.inner.multiply(chunk, rows, inner)
        call.activate(chunk, inner, h, h)
        call.outer.multiply(chunk, h, out[chunk.start : chunk.stop])

    columns = {"x": call.width, "h": call.hidden, "inner": 0 if keep else call.inner.columns}
    run_chunks(call.plan.chunks, work, given.x, columns, call.threads)
    kept[call.plan.rows :].zero_()  # no uninitialised memory leaves an operator
    return call.combine(out, given.weight), kept


@torch.library.custom_op(
    "moestro::bank_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, Tensor kept, bool[] needs, {SCHEMA}) -> Tensor[]",
)
def bank_backward(*arguments: Any) -> list[Tensor]:
    """The gradients of `LEARNING`, those that `needs` asks for, in this order.

    Args: grad: of y. kept: pre-activations, without rows if they are to be computed again. needs: of each of
    `LEARNING`. And those of `Arguments`.
    """
    found = _backward(*arguments, earlier={})
    return [found[name] for name in LEARNING if name in found]


@torch.library.custom_op(
    "moestro::bank_backward_into",
    mutates_args=[f"earlier_{name}" for name in PARAMETERS],
    device_types="cpu",
    schema=f"({EARLIER}, Tensor grad, Tensor kept, bool[] needs, {SCHEMA}) -> (Tensor, Tensor)",
)
def bank_backward_into(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`bank_backward`, which adds the gradients of parameters to earlier ones.

    Spares a gradient as large as the parameter, and autograd's pass that adds it.

    Args: the earlier gradient of each of `PARAMETERS`, None where `needs` asks for none; and those of
    `bank_backward`.

    Returns: gradients of x and of weight, without elements if not asked for.
    """
    earlier, (grad, *rest) = arguments[: len(PARAMETERS)], arguments[len(PARAMETERS) :]
    found = _backward(grad, *rest, earlier=dict(zip(PARAMETERS, earlier, strict=True)))
    return found.get("x", grad.new_empty(0)), found.get("weight", grad.new_empty(0))


def _backward(
    grad: Tensor, kept: Tensor, needs: list[bool], *given: Any, earlier: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return Backward(Call(Arguments(*given)), grad, kept, dict(zip(LEARNING, needs, strict=True)), earlier).run()


@bank.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    given, keep = Arguments(*arguments[:-2]), arguments[-2]
    rows, columns = kept_shape(given)
    return given.x.new_empty(given.x.shape), given.x.new_empty(rows if keep else 0, columns)


@bank_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    _, _, needs, *given = arguments
    inputs = (getattr(Arguments(*given), name) for name in LEARNING)
    return [torch.empty_like(each) for each, need in zip(inputs, needs, strict=True) if need and each is not None]


@bank_backward_into.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    grad, _, needs, *rest = arguments[len(PARAMETERS) :]
    x, weight = (getattr(Arguments(*rest), name) for name in LEARNING[:2])
    return (
        torch.empty_like(x) if needs[0] else grad.new_empty(0),
        torch.empty_like(weight) if needs[1] and weight is not None else grad.new_empty(0),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, activation, rounding, _, accumulate = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.names = (activation, rounding)
    given = dict(zip(Arguments._fields, inputs, strict=False))
    # not as saved tensors: activation checkpointing hands back others, which have no .grad
    ctx.parameters = {name: given[name] for name in PARAMETERS} if accumulate else {}


def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors
    wanted = dict(zip(Arguments._fields, ctx.needs_input_grad, strict=False))
    found: dict[str, Tensor] = {}
    if grad is not None:
        needs = [wanted[name] for name in LEARNING]
        given = (grad.contiguous(), kept, needs, *tensors, *ctx.names)
        earlier = existing_gradients({name: each for name, each in ctx.parameters.items() if wanted[name]})
        asked = [name for name in LEARNING if wanted[name]]
        if earlier:
            gradients = bank_backward_into(*(earlier.get(name) for name in PARAMETERS), *given)
            found = dict(zip(LEARNING[:2], gradients, strict=True))
        else:
            found = dict(zip(asked, bank_backward(*given), strict=True))
    return (*(found.get(name) if wanted[name] else None for name in Arguments._fields), None, None)


bank.register_autograd(_gradients, setup_context=_remember)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "the fused bank has no second derivative; build the experts with kernel='loop' to differentiate twice"
    )


bank_backward.register_autograd(_refuse)
