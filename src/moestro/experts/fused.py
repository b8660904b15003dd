"""How a stacked bank reaches the fused operator, and when it does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.experts.activations import ACTIVATIONS
from moestro.experts.device import on_device, run_on_device
from moestro.kernels import as_autocast
from moestro.kernels.bank import bank as bank_operator
from moestro.kernels.grouped import all_backends, check_offsets
from moestro.kernels.plan import rounding_for
from moestro.routing import SparseRouting

KERNELS = ("fused", "tiled")
Operator = Callable[["Stacked", Tensor, Tensor, tuple[Tensor | None, ...]], Tensor]


class Stacked(Protocol):
    """What `run_fused` reads of a bank; a plain one has no gate."""

    up: Any
    down: Any
    up_bias: Any
    down_bias: Any
    activation: str
    kernel: str
    recompute: bool
    accumulates: bool


def all_kernels(device_type: str | None = None) -> tuple[str, ...]:
    """Names that a stacked bank takes as its kernel: back ends of the grouped product, and fused operators.

    Args:
        device_type: of `cpu` or `cuda`, only those that run there.
    """
    return (*all_backends(device_type), *(KERNELS if device_type in (None, "cpu") else ()))


def check_kernel(name: str, recompute: bool = False, activation: str = ACTIVATIONS[0]) -> str:
    """The name itself, or ValueError naming the kernels there are, or those that can recompute or have the unit."""
    if name not in all_kernels():
        raise ValueError(f"unknown kernel {name!r}; choose one of {', '.join(all_kernels())}")
    able = ("auto", *KERNELS, "triton")
    if recompute and name not in able:
        raise ValueError(f"kernel={name!r} cannot recompute; use recompute=False or one of {', '.join(able)}")
    whole = name in (*KERNELS, "triton")
    if (whole or recompute) and activation not in ACTIVATIONS:
        raise ValueError(
            f"the fused operators have no {activation}, so kernel={name!r}, recompute={recompute} cannot be; "
            "use kernel='auto' and recompute=False"
        )
    return name


def is_fused(bank: object, device_type: str) -> bool:
    """Whether the CPU's fused operator runs a bank there: stacked, on a CPU, with a kernel that allows it.

    That of a GPU is Triton's, see `is_planned_on_device`.
    """
    return (
        device_type == "cpu"
        and hasattr(bank, "recompute")
        and getattr(bank, "activation", None) in ACTIVATIONS
        and getattr(bank, "kernel", None) in ("auto", *KERNELS)
    )


def accumulate_in_place(model: nn.Module, wanted: bool = True) -> list[str]:
    """Let the backward of fused banks add to an existing `.grad` itself, for training with several micro-batches.

    Otherwise every backward after the first makes a gradient as large as the bank, which autograd adds in a pass of
    its own. The sums are equal but for their last rounding. Autograd adds as ever in `torch.autograd.grad`, under
    `create_graph`, for banks with hooks on a parameter, in compiled graphs, for `kernel="tiled"` and on a GPU. Do
    not use it with what sees gradients on their way into `.grad` by other means than those hooks, as
    DistributedDataParallel does while it synchronises.

    Args:
        model: whose banks, at any depth, are told.
        wanted: False takes it back.

    Returns: names of the banks that can, in order; empty if there is none and nothing has changed.
    """
    able = [
        (name, module)
        for name, module in model.named_modules()
        if is_fused(module, "cpu") and module.kernel != "tiled"
    ]
    for _, module in able:
        module.accumulates = wanted
    return [name for name, _ in able]


def operator_of(bank: Stacked, x: Tensor) -> Operator | None:
    """What runs this bank on these rows as a whole; None = nothing does, grouped products have to."""
    if bank.activation not in ACTIVATIONS:
        return None
    if on_device(bank, x):
        return run_on_device
    rounding = _rounding_of(bank, x)
    return None if rounding is None else partial(_run_on_cpu, rounding=rounding)


def _rounding_of(bank: Stacked, x: Tensor) -> str | None:
    """The rounding with which the CPU's operator runs this bank on these rows; None = it does not."""
    if bank.kernel not in ("auto", *KERNELS):
        return None
    if x.device.type != "cpu":
        if bank.kernel in KERNELS:
            raise ValueError(f"kernel={bank.kernel!r} runs on a CPU, not on {x.device}; use kernel='auto'")
        return None
    if bank.kernel == "tiled":
        return "tiles"
    return rounding_for(as_autocast_dtype(x), bank.down.shape[1] * bank.down.shape[2])


def as_autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are computed."""
    return as_autocast(x[:0]).dtype


def run_fused(bank: Stacked, x: Tensor, routing: SparseRouting, operator: Operator) -> Tensor:
    """`y = C F(D x)` in one operator. Shapes: x `[tokens, width]` -> `[tokens, width]`."""
    order, starts = routing.by_token()
    return operator(bank, x, routing.offsets, (routing.token, routing.weight, order, starts))


def rows_fused(bank: Stacked, rows: Tensor, offsets: Tensor, operator: Operator) -> Tensor:
    """Rows grouped by expert through their experts. Shapes: `[rows, width]` -> `[rows, width]`."""
    check_offsets(offsets, len(rows), len(bank.up))
    return operator(bank, rows, offsets, (None, None, None, None))


def _run_on_cpu(
    bank: Stacked, x: Tensor, offsets: Tensor, routing: tuple[Tensor | None, ...], rounding: str
) -> Tensor:
    x = as_autocast(x)
    gate, gate_bias = getattr(bank, "gate", None), getattr(bank, "gate_bias", None)
    parameters: tuple[Tensor | None, ...] = (gate, bank.up, bank.down, gate_bias, bank.up_bias, bank.down_bias)
    if x.dtype != bank.up.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"rows are {x.dtype} but the experts' weights are {bank.up.dtype}; cast one of them, or use autocast"
        )
    if x.shape[1] != bank.up.shape[1]:
        raise ValueError(f"rows have width {x.shape[1]} but the experts take {bank.up.shape[1]}")
    width = x.shape[1]
    if rounding == "tiles":
        x, parameters = _wide(x), tuple(each if each is None else _wide(each) for each in parameters)
    inputs = (x, routing[1], *parameters)
    learns = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)
    keep = learns and not bank.recompute
    options = (bank.activation, rounding, keep, bank.accumulates)
    y: Tensor = bank_operator(x, offsets, *routing, *parameters, *options)[0]
    return y[:, :width]


def _wide(x: Tensor) -> Tensor:
    """`x` with zeros up to multiples of 16 in its last dimension, and of a matrix `[experts, in, out]` in both.

    Among other sizes, the last rows of a float64 or float32 product may be summed in another order than the first.
    """
    columns, rows = -x.shape[-1] % 16, -x.shape[1] % 16 if x.dim() == 3 else 0
    return F.pad(x, (0, columns, 0, rows)) if columns or rows else x
