"""The kernel gate: posterior shares smoothed over the inputs (Young & Hunter 2010)."""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.mixtures.gates.base import Effort, Gate, Params
from moestro.mixtures.numerics import Array
from moestro.mixtures.rows import Rows, Scaling

_BLOCK = 1024  # rows of the kernel matrix at a time
_PRIOR = 1e-3  # rows' worth of the overall shares, so that a place without neighbours has an answer
_RIDGE = 1e-3  # keeps local slopes finite where all neighbours stand at one place
_EDGE = 1e-6
_TRIWEIGHT = 2.978  # radius of a triweight kernel that smooths like a normal one of deviation 1


class KernelGate(Gate):
    """Gate probabilities that follow no formula: a local line through the posterior shares of the fitted rows.

        g_i(x) = α0 of argmin sum_t K_b(x - x_t) (h_ti - α0 - α1ᵀ(x - x_t))²    Young & Hunter 2010

    with the triweight kernel `(1 - r²/b²)³`. Estimates are clipped to [1e-6, 1 - 1e-6] and renormalised. This is no
    EM: the likelihood may dip, and the best iterate is kept. It costs `rows²` per step. The paper has one input;
    for d inputs r is the root mean square difference of the standardised inputs.

    Args:
        bandwidth: radius b over Silverman's rule of thumb, `2.98 (4 / (d + 2))^(1/(d+4)) n^(-1/(d+4))`.
        local: "line" or "constant" (Nadaraya & Watson).

    Parameters: `at` `[rows, features]`, `weight` `[rows]`, `share` `[rows, experts]`, `radius`.
    """

    climbs = False
    parametric = False

    def __init__(self, bandwidth: float = 1.0, local: str = "line"):
        self.bandwidth = bandwidth
        self.local = local

    def design(self, x: Array, scaling: Scaling) -> Array:
        return scaling.x(x)

    def start(self, rows: Rows, share: Array, branching: tuple[int, ...], effort: Effort) -> Params:
        if self.local not in ("line", "constant") or not self.bandwidth > 0:
            raise ValueError(
                f"local={self.local!r} must be line or constant, and bandwidth={self.bandwidth} above 0"
            )
        return self.m_step(rows, share, {}, effort)

    def m_step(self, rows: Rows, share: Array, params: Params, effort: Effort) -> Params:
        width = rows.u.shape[1]
        rule = (4 / (width + 2) / rows.total) ** (1 / (width + 4))
        radius = self.bandwidth * _TRIWEIGHT * rule
        return {"at": rows.u, "weight": rows.weight, "share": share, "radius": radius}

    def log_weight(self, params: Params, u: Array) -> Array:
        blocks = [self._smooth(params, u[at : at + _BLOCK])[0] for at in range(0, len(u), _BLOCK)]
        share = np.clip(np.concatenate(blocks), _EDGE, 1 - _EDGE)
        return np.log(share / share.sum(1, keepdims=True))

    def _smooth(self, params: Params, u: Array) -> tuple[Array, Array]:
        """Local estimates `[rows, experts]`, and the pull of a row of weight one at the same place, `[rows]`."""
        at, share, weight = params["at"], params["share"], params["weight"]
        square = (u**2).sum(1)[:, None] - 2 * u @ at.T + (at**2).sum(1)
        kernel = np.maximum(1 - square / (at.shape[1] * params["radius"] ** 2), 0.0) ** 3
        kernel = np.minimum(kernel, 1.0) * weight
        total = kernel.sum(1) + _PRIOR
        value = kernel @ share + _PRIOR * (weight @ share / weight.sum())
        if self.local == "constant":
            return value / total[:, None], 1 / total
        return self._lines(params, u, kernel, total, value)

    @staticmethod
    def _lines(params: Params, u: Array, kernel: Array, total: Array, value: Array) -> tuple[Array, Array]:
        at, share = params["at"], params["share"]
        (num, width), experts = u.shape, share.shape[1]
        squares = (at[:, :, None] * at[:, None, :]).reshape(len(at), -1)
        crossed = (at[:, :, None] * share[:, None, :]).reshape(len(at), -1)
        moments = kernel @ np.hstack([np.ones((len(at), 1)), at, squares, share, crossed])
        zero, first, second, plain, mixed = np.split(
            moments, np.cumsum([1, width, width * width, experts]), axis=1
        )  # about the origin; the local lines want them about their own places
        local = first - zero * u
        outer = second.reshape(num, width, width) - u[:, :, None] * first[:, None] - local[:, :, None] * u[:, None]
        system = np.empty((num, width + 1, width + 1))
        system[:, 0, 0], system[:, 0, 1:], system[:, 1:, 0], system[:, 1:, 1:] = total, local, local, outer
        system[:, range(1, width + 1), range(1, width + 1)] += _RIDGE * params["radius"] ** 2 * total[:, None]
        slopes = mixed.reshape(num, width, experts) - u[:, :, None] * plain[:, None]
        answer = np.concatenate([value[:, None], slopes], axis=1)
        inverse = np.linalg.solve(system, np.eye(width + 1)[None, :, :1].repeat(num, 0))[:, :, 0]
        return np.einsum("tk,tke->te", inverse, answer), inverse[:, 0]

    def count(self, params: Params) -> int:
        """Degrees of freedom of the smoother for all shares but one, rounded."""
        at = params["at"]
        pull = [self._smooth(params, at[k : k + _BLOCK])[1] for k in range(0, len(at), _BLOCK)]
        return round(float(np.concatenate(pull) @ params["weight"]) * (params["share"].shape[1] - 1))

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        return {"gate_bandwidth_": params["radius"] * scaling.x_scale}

    def permute(self, params: Params, order: Array) -> Params:
        return {**params, "share": params["share"][:, order]}
