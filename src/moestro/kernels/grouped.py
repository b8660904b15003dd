"""One grouped matrix product with a choice of back ends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GroupedMatmul = Callable[[Tensor, Tensor, Tensor], Tensor]

_BACKENDS: dict[str, GroupedMatmul] = {}
_DEVICES: dict[str, tuple[str, ...]] = {}


def backend(name: str, devices: tuple[str, ...] = ()) -> Callable[[GroupedMatmul], GroupedMatmul]:
    """Register a grouped matrix product under a name, with the types of device that it runs on; none = all."""

    def register(function: GroupedMatmul) -> GroupedMatmul:
        _BACKENDS[name], _DEVICES[name] = function, devices
        return function

    return register


def all_backends(device_type: str | None = None) -> tuple[str, ...]:
    """Names that `grouped_matmul` accepts; of a type of device (`cpu`, `cuda`), those that run there."""
    names = (name for name, devices in _DEVICES.items() if not devices or device_type in (None, *devices))
    return ("auto", *names)


def check_backend(name: str) -> str:
    """The name itself, or ValueError naming the back ends there are."""
    if name not in all_backends():
        raise ValueError(f"unknown kernel {name!r}; choose one of {', '.join(all_backends())}")
    return name


def grouped_matmul(rows: Tensor, weight: Tensor, offsets: Tensor, backend: str = "auto") -> Tensor:
    """Multiply each group of rows by the matrix of its expert.

        y[i] = rows[i] @ weight[e]   for offsets[e] <= i < offsets[e + 1]

    Under autocast both factors are cast as `torch.matmul` would cast them.

    Args:
        rows: grouped by expert, `[rows, width]`.
        weight: one matrix per expert, `[experts, width, out]`.
        offsets: where groups begin, rising from 0 to `rows`, `[experts + 1]` int64.
        backend: `loop`, `padded`, `native`, `rounded`, `triton` (on a GPU), or `auto`, which takes the one measured
            fastest on a CPU, and torch's own on a GPU.

    Returns: `[rows, out]`.

    Raises:
        ValueError: shapes that do not fit, an unknown back end, or (checked on a CPU, where it is free)
            offsets that do not rise from 0 to `rows`.
    """
    _check(rows, weight, offsets)
    check_backend(backend)
    rows, weight = as_autocast(rows), as_autocast(weight)
    name = _fastest(rows) if backend == "auto" else backend
    return _BACKENDS[name](rows, weight, offsets)


def _fastest(rows: Tensor) -> str:
    """The back end for these rows; `benchmarks/layer.py` measures the choice."""
    if rows.dtype == torch.float64:
        return "loop"
    return "rounded" if rows.device.type == "cpu" and rows.dtype != torch.float32 else "native"


def _check(rows: Tensor, weight: Tensor, offsets: Tensor) -> None:
    if rows.dim() != 2 or weight.dim() != 3 or rows.shape[1] != weight.shape[1]:
        raise ValueError(
            f"rows [rows, width] and weight [experts, width, out] must share the width, "
            f"got {list(rows.shape)} and {list(weight.shape)}"
        )
    check_offsets(offsets, len(rows), len(weight))


def check_offsets(offsets: Tensor, rows: int, num_experts: int) -> None:
    """Raise ValueError for offsets of other experts, or (on a CPU) that do not rise from 0 to `rows`."""
    if offsets.shape != (num_experts + 1,):
        raise ValueError(f"{num_experts} experts need {num_experts + 1} offsets, got {list(offsets.shape)}")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != rows or sorted(bounds) != bounds:
            raise ValueError(f"offsets must rise from 0 to {rows} rows, got {bounds}")


def as_autocast(x: Tensor) -> Tensor:
    """`x` in the dtype in which autocast computes products; unchanged outside autocast, and in float64.

    Cast once before several products of the same rows: autocast itself would copy them for each.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))
