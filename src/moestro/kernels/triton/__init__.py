"""The experts of a layer as Triton kernels, for graphics processors.

**These kernels have never run on a graphics processor.** They are tested in Triton's interpreter on a CPU, against
float64 in outputs and every gradient, and compiled for the architectures that `docs/gpu.md` names; tile sizes and
the rules of `auto` are chosen by reasoning, not by measurement. `benchmarks/gpu.py` checks and times them where
there is a device.

Triton is imported only when these kernels are asked for; nothing else in the package needs it.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from moestro.kernels.grouped import backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cuda", "xpu")  # Triton's; only the first was ever compiled for


@backend("triton", devices=DEVICES)
def triton(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Grouped matmul as one Triton kernel, without padding; any size; twice differentiable.

    Never run on a device, see above. Takes float32, bfloat16 and float16, and accumulates in float32.
    Shapes: rows `[rows, width]`, weight `[experts, width, out]`, offsets `[experts + 1]` -> `[rows, out]`.
    """
    check_rows(rows, weight)
    from moestro.kernels.triton.product import grouped_product

    return grouped_product(rows, weight, offsets)


def check_rows(rows: Tensor, weight: Tensor) -> None:
    """Raise ValueError for what these kernels cannot run: no Triton, a CPU, or other dtypes."""
    if not is_installed():
        raise ValueError(
            "kernel='triton' needs the package triton, which is not installed: pip install triton, "
            "or use kernel='native', which needs nothing"
        )
    if rows.device.type == "cpu" and not is_interpreted():
        raise ValueError(
            "kernel='triton' runs on a GPU, not on a CPU; use kernel='auto' "
            "(or set TRITON_INTERPRET=1 before Python starts, to run it in Triton's slow interpreter)"
        )
    if rows.dtype not in DTYPES or rows.dtype != weight.dtype:
        raise ValueError(
            f"kernel='triton' takes rows and weights of one dtype, float32, bfloat16 or float16, "
            f"got {rows.dtype} and {weight.dtype}; cast them, use autocast, or use kernel='loop'"
        )


def suits(rows: Tensor) -> bool:
    """Whether `auto` runs a bank of experts on these rows in Triton.

    It does so for bfloat16 and float16 on an NVIDIA device from Ampere on (compute capability 8.0) where Triton is
    installed. float32 is left to torch's own products, which Triton has no reason to beat. A rule by reasoning:
    nothing was measured.
    """
    return (
        rows.device.type == "cuda"
        and rows.dtype in (torch.bfloat16, torch.float16)
        and torch.version.hip is None
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
        and is_installed()
    )


def is_installed() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (`TRITON_INTERPRET=1` before Python starts).

    Read as Triton reads it, whose own settings no compiler can follow.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
