"""How a stacked bank reaches the Triton operator, and when `auto` takes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moestro.experts.activations import ACTIVATIONS
from moestro.kernels import as_autocast
from moestro.kernels import triton as kernels


def on_device(bank: Any, x: Tensor) -> bool:
    """Whether the Triton operator runs this bank on these rows; by its kernel, or by the rule of `auto`."""
    return bank.kernel == "triton" or (bank.kernel == "auto" and kernels.suits(as_autocast(x[:0])))


def is_planned_on_device(bank: Any, device_type: str, dtype: torch.dtype) -> bool:
    """Whether the Triton operator would run a stacked bank in that dtype on such a device, which need not be here.

    By its kernel; or by the rule of `auto`, which this machine's packages and an NVIDIA device from Ampere on are
    taken to fulfil.
    """
    if not hasattr(bank, "recompute") or getattr(bank, "activation", None) not in ACTIVATIONS:
        return False
    if bank.kernel != "auto":
        return bool(bank.kernel == "triton")
    return device_type == "cuda" and dtype in (torch.bfloat16, torch.float16) and kernels.is_installed()


def run_on_device(bank: Any, x: Tensor, offsets: Tensor, routing: tuple[Tensor | None, ...]) -> Tensor:
    """A bank on rows, with routing (token, weight, order, starts) or four times None.

    Weights are cast by autocast as for any product, all at once.

    Raises:
        ValueError: no Triton, a CPU, weights of another dtype or width than the rows.
    """
    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    given = [getattr(bank, name, None) for name in names]
    parameters = [None if each is None else as_autocast(each) for each in given]
    x, up = as_autocast(x), as_autocast(bank.up)
    kernels.check_rows(x, up)
    if x.shape[1] != up.shape[1]:
        raise ValueError(f"rows have width {x.shape[1]} but the experts take {up.shape[1]}")
    from moestro.kernels.triton.operator import triton_bank
    from moestro.kernels.triton.settings import setting_for

    inputs = (x, routing[1], *parameters)
    learns = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)
    pairs = (x if routing[0] is None else routing[0]).shape[0]
    setting, keep = setting_for(pairs, up.shape[0]), learns and not bank.recompute
    y: Tensor = triton_bank(x, offsets, *routing, *parameters, bank.activation, setting, keep)[0]
    return y
