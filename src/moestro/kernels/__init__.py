"""Grouped matrix products: the only room with back ends. They change speed, never meaning."""

from moestro.kernels import loop, native, padded, rounded, triton
from moestro.kernels.grouped import all_backends, as_autocast, grouped_matmul

__all__ = ["all_backends", "as_autocast", "grouped_matmul", "loop", "native", "padded", "rounded", "triton"]
