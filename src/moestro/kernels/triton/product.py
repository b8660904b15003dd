"""The grouped product alone, registered with `torch.library` as `moestro::triton_product`."""

from __future__ import annotations

from torch import Tensor

from moestro.kernels.registered import registered
from moestro.kernels.triton.launch import Launch
from moestro.kernels.triton.settings import SETTINGS, setting_for


def _product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return _launch(rows, offsets).product(rows, weight)


def _outer(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    out = rows.new_empty(len(offsets) - 1, rows.shape[1], grad.shape[1])
    _launch(rows, offsets).weight_gradient(rows, grad, out)
    return out


def _launch(rows: Tensor, offsets: Tensor) -> Launch:
    setting = setting_for(len(rows), len(offsets) - 1)
    return Launch(rows, offsets, len(rows), SETTINGS[setting])


grouped_product = registered("triton", _product, _outer)
