"""The rows of one fit in the scale in which the parts see them, and the way back to the user's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moestro.mixtures.numerics import Array, weighted_moments


@dataclass(frozen=True)
class Scaling:
    """Affine maps `x = x_center + x_scale * standardised` and the same for y.

    The targets share one scale, so that spherical stays spherical.
    `columns` says which of `width` features these are; None means all.
    Shapes: x_center, x_scale `[features]`, y_center `[outputs]`.
    """

    x_center: Array
    x_scale: Array
    y_center: Array
    y_scale: float
    columns: tuple[int, ...] | None = None
    width: int | None = None

    @classmethod
    def of(cls, x: Array, y: Array, weight: Array, scale_target: bool) -> Scaling:
        """Weighted means and deviations; targets of counts, classes and positive numbers stay as they are."""
        center, scale = weighted_moments(x, weight)
        if not scale_target:
            return cls(center, scale, np.zeros(y.shape[1]), 1.0)
        y_center, y_scale = weighted_moments(y, weight)
        constant = weight @ (y - y_center) ** 2 <= 1e-24 * weight.sum() * np.maximum(1.0, y_center**2)
        spread = 1.0 if constant.all() else float(np.sqrt(np.mean(y_scale[~constant] ** 2)))
        return cls(center, scale, y_center, spread)

    def only(self, columns: Sequence[int] | None) -> Scaling:
        """The same maps for some of the features."""
        if columns is None:
            return self
        at = list(columns)
        return replace(
            self, x_center=self.x_center[at], x_scale=self.x_scale[at], columns=tuple(at), width=self.num_features
        )

    @property
    def num_features(self) -> int:
        """Of the user's inputs, read or not."""
        return len(self.x_center) if self.width is None else self.width

    def select(self, x: Array) -> Array:
        """The columns of these features, in the user's units."""
        return x if self.columns is None else np.take(x, self.columns, axis=1)

    def x(self, x: Array) -> Array:
        return (self.select(x) - self.x_center) / self.x_scale

    def y(self, y: Array) -> Array:
        return (y - self.y_center) / self.y_scale

    def log_volume(self) -> float:
        """What a log-density in standardised units is too large by."""
        return len(self.y_center) * float(np.log(self.y_scale))

    def plane(self, coef: Array) -> tuple[Array, Array]:
        """Intercepts and slopes in the units of x, of linear predictors `[..., 1 + features]`; features that are
        not read have slope 0."""
        slopes = coef[..., 1:] / self.x_scale
        intercept = coef[..., 0] - slopes @ self.x_center
        if self.columns is None:
            return intercept, slopes
        every = np.zeros((*slopes.shape[:-1], self.num_features))
        every[..., list(self.columns)] = slopes
        return intercept, every


@dataclass(frozen=True)
class Sides:
    """The scale of all features, of those that the gate reads, and of those that the experts read."""

    whole: Scaling
    gate: Scaling
    expert: Scaling

    @classmethod
    def of(cls, whole: Scaling, gate: Sequence[int] | None = None, expert: Sequence[int] | None = None) -> Sides:
        return cls(whole, whole.only(gate), whole.only(expert))

    @property
    def columns(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """What gate and experts read; None means all."""
        return self.gate.columns, self.expert.columns


@dataclass(frozen=True)
class Rows:
    """What the M-steps read.

    Shapes: u `[rows, gate features]` with a leading 1, z `[rows, expert features]` with a leading 1,
    y `[rows, outputs]` (one column per class for classes), weight `[rows]`.
    `scaling` is that of the experts' features, `floor` the smallest variance that an expert may have, in
    standardised units.
    """

    u: Array
    z: Array
    y: Array
    weight: Array
    scaling: Scaling
    floor: float

    @property
    def total(self) -> float:
        return float(self.weight.sum())


def with_intercept(x: Array) -> Array:
    """`[1, x]`. Shapes: `[rows, features]` -> `[rows, 1 + features]`."""
    return np.hstack([np.ones((len(x), 1)), x])


def merge_repeats(x: Array, y: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Rows in an order of their own, equal rows merged and their weights added.

    A row of weight two and the same row written twice then lead to the same arithmetic, bit for bit, and the
    order of the rows does not matter. Sorts one hash per row; rows whose hashes collide stay apart.
    """
    values = np.hstack([x, y]) + 0.0  # -0.0 and 0.0 are one number
    bits = np.ascontiguousarray(values.T).view(np.uint64)
    key = np.zeros(len(x), dtype=np.uint64)
    for column in bits:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    order = np.argsort(key, kind="stable")
    same = np.append(False, key[order][1:] == key[order][:-1])
    same[same] = (values[order][same] == values[order[np.flatnonzero(same) - 1]]).all(1)
    first = np.flatnonzero(~same)
    kept = order[first]
    return x[kept], y[kept], np.add.reduceat(weight[order], first)
