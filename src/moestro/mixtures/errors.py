"""Standard errors from the observed information, and the table that shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moestro.mixtures.mixture import Mixture
from moestro.mixtures.numerics import Array, softmax_rows
from moestro.mixtures.rows import Rows, Sides


def covariance(mixture: Mixture, rows: Rows) -> Array:
    """Inverse of the observed information of the free numbers, by central differences of the exact gradient.

    Directions in which the likelihood is flat or not concave get infinite variance.
    """
    if not (mixture.expert.parametric and mixture.gate.parametric):
        raise ValueError(
            f"{mixture.gate!r} with {mixture.expert!r} has no finite set of numbers to inform about; "
            "pass method='bootstrap'"
        )
    if not mixture.expert.smooth:
        raise ValueError(
            f"{mixture.expert!r} has a kinked density without information matrix; pass method='bootstrap'"
        )
    center = mixture.free()
    information = np.empty((len(center), len(center)))
    for k in range(len(center)):
        step = np.zeros_like(center)
        step[k] = 1e-5 * max(1.0, abs(center[k]))
        rise = mixture.restore(center + step).gradient(rows) - mixture.restore(center - step).gradient(rows)
        information[k] = -rise / (2 * step[k])
    information = 0.5 * (information + information.T)
    values, vectors = np.linalg.eigh(information)
    inverse = np.where(values > 1e-9 * values[-1], 1 / np.where(values == 0, 1.0, values), np.inf)
    with np.errstate(invalid="ignore"):
        spread = np.einsum("ak,k,bk->ab", vectors, np.where(np.isfinite(inverse), inverse, 0.0), vectors)
    flat = (np.abs(vectors[:, ~np.isfinite(inverse)]) > 1e-6).any(1)
    spread[flat, flat] = np.inf
    return spread


def attribute_errors(mixture: Mixture, rows: Rows, sides: Sides) -> dict[str, Any]:
    """Standard errors of the fitted attributes by the delta method, in the shapes of the attributes."""
    spread = covariance(mixture, rows)
    center = mixture.free()
    flat = np.isinf(np.diag(spread))
    known = np.where(np.isfinite(spread), spread, 0.0)
    at_center = attributes(mixture, sides)
    slopes: dict[str, list[Array]] = {name: [] for name in at_center}
    for k in range(len(center)):
        step = np.zeros_like(center)
        step[k] = 1e-6 * max(1.0, abs(center[k]))
        above = attributes(mixture.restore(center + step), sides)
        below = attributes(mixture.restore(center - step), sides)
        for name in slopes:
            slopes[name].append((above[name] - below[name]) / (2 * step[k]))
    found = {}
    for name, columns in slopes.items():
        jacobian = np.stack(columns)  # [free numbers, ...]
        wide = jacobian.reshape(len(center), -1)
        variance = np.einsum("ka,kl,la->a", wide, known, wide)
        variance[(np.abs(wide[flat]) > 1e-9).any(0)] = np.inf
        found[name] = np.sqrt(np.maximum(variance, 0.0)).reshape(jacobian.shape[1:])
    return found


def bootstrap_errors(
    mixture: Mixture,
    rows: Rows,
    sides: Sides,
    refit: Callable[[Rows], Mixture],
    num_resamples: int,
    rng: np.random.RandomState,
) -> dict[str, Any]:
    """Standard deviations of the attributes over refits to rows drawn with replacement, by weight.

    Experts of a flat mixture are matched to the original by shared responsibility on all rows.
    """
    share = softmax_rows(mixture.joint(rows.u, rows.z, rows.y))[1] * rows.weight[:, None]
    chance = rows.weight / rows.total
    tree = mixture.gate.hierarchical and len(mixture.gate_params["coef"]) > 1  # leaves keep their places
    found: dict[str, list[Array]] = {}
    for _ in range(num_resamples):
        drawn = rng.multinomial(round(rows.total), chance).astype(np.float64)
        used = drawn > 0
        part = replace(rows, u=rows.u[used], z=rows.z[used], y=rows.y[used], weight=drawn[used])
        other = refit(part)
        order = linear_sum_assignment(-share.T @ softmax_rows(other.joint(rows.u, rows.z, rows.y))[1])[1]
        if not tree and (order != np.arange(len(order))).any():
            other = other.permute(order)
        for name, value in attributes(other, sides).items():
            found.setdefault(name, []).append(value)
    return {name: np.std(values, axis=0, ddof=1) for name, values in found.items()}


def attributes(mixture: Mixture, sides: Sides) -> dict[str, Array]:
    """Fitted attributes that are arrays, in the user's units."""
    every = {
        **mixture.gate.attributes(mixture.gate_params, sides.gate),
        **mixture.expert.attributes(mixture.expert_params, sides.expert),
    }
    return {name: np.asarray(value) for name, value in every.items() if not isinstance(value, list)}


def table(estimates: dict[str, Array], errors: dict[str, Array] | None) -> str:
    """One line per number: attribute, place, estimate, standard error, z value."""
    lines = [f"{'parameter':<36}{'estimate':>14}" + (f"{'std. error':>14}{'z':>10}" if errors else "")]
    for name, value in estimates.items():
        for place in np.ndindex(value.shape):
            label = name.rstrip("_") + str(list(place))
            line = f"{label:<36}{value[place]:>14.6g}"
            if errors:
                error = errors[name][place]
                ratio = f"{value[place] / error:.2f}" if 0 < error < np.inf else ""
                line += f"{error:>14.4g}{ratio:>10}"
            lines.append(line)
    return "\n".join(lines)
