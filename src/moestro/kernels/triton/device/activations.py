"""The non-linearities of experts and their derivatives, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The non-linearity itself; `swiglu` and `geglu` stand for that of their gate."""
    if ACTIVATION == "swiglu" or ACTIVATION == "silu":
        y = z * tl.sigmoid(z)
    elif ACTIVATION == "geglu" or ACTIVATION == "gelu":
        y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "relu":
        y = tl.maximum(z, 0.0)
    else:
        tl.static_assert(ACTIVATION == "squared_relu")
        y = tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
    return y


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """Its derivative at z; at the kink of relu zero, as in torch."""
    if ACTIVATION == "swiglu" or ACTIVATION == "silu":
        s = tl.sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "geglu" or ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "relu":
        slope = tl.where(z > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "squared_relu")
        slope = 2.0 * tl.maximum(z, 0.0)
    return slope
