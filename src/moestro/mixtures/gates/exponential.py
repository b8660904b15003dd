"""The exponential-family gate: every expert owns a density of mixed columns (Xu, Jordan & Hinton 1995)."""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.mixtures.gates.base import Effort, Gate, Params
from moestro.mixtures.gates.families import FAMILIES, Family
from moestro.mixtures.numerics import Array, is_empty
from moestro.mixtures.rows import Rows, Scaling


class ExponentialFamilyGate(Gate):
    """Experts own regions of the input space described column by column; EM raises the joint likelihood.

        g_i(x) ∝ α_i prod_k p_k(x_k | ν_ik)    Xu, Jordan & Hinton 1995; M-step: match mean sufficient statistics

    Columns are independent given the expert. Inputs stay in the user's units.

    Args:
        families: one of "gaussian", "bernoulli", "categorical", "poisson", "exponential", "gamma" per column, or
            one name for all; "auto" takes "bernoulli" for columns of zeros and ones and "gaussian" for others.

    Raises:
        ValueError: for an unknown family, a wrong number of them, or a column outside its family's support.

    Parameters: `log_weight` `[experts]`, `families` (names), `columns` (one array `[experts, numbers]` per column).
    """

    generative = True

    def __init__(self, families: str | tuple[str, ...] = "auto"):
        self.families = families

    def design(self, x: Array, scaling: Scaling) -> Array:
        return scaling.select(x)

    def _resolve(self, x: Array) -> tuple[str, ...]:
        if self.families == "auto":
            return tuple("bernoulli" if np.isin(column, (0, 1)).all() else "gaussian" for column in x.T)
        names = (self.families,) * x.shape[1] if isinstance(self.families, str) else tuple(self.families)
        unknown = [name for name in names if name not in FAMILIES]
        if unknown or len(names) != x.shape[1]:
            raise ValueError(
                f"families={self.families!r} for {x.shape[1]} columns; pass one of {', '.join(FAMILIES)} per column"
            )
        return names

    def start(self, rows: Rows, share: Array, branching: tuple[int, ...], effort: Effort) -> Params:
        names = self._resolve(rows.u)
        for k, name in enumerate(names):
            FAMILIES[name].check(rows.u[:, k], k)
        return self.m_step(rows, share, {"families": names}, effort)

    @staticmethod
    def _parts(params: Params) -> list[tuple[int, Family]]:
        return [(k, FAMILIES[name]) for k, name in enumerate(params["families"])]

    def m_step(self, rows: Rows, share: Array, params: Params, effort: Effort) -> Params:
        weighted = rows.weight[:, None] * share
        mass = weighted.sum(0)
        empty = is_empty(mass, rows.total)
        columns = []
        for k, family in self._parts(params):
            found = family.fit(rows.u[:, k], rows.weight, weighted)
            if "columns" in params and empty.any():
                found = np.where(empty[:, None], params["columns"][k], found)
            columns.append(found)
        log_weight = np.log(np.maximum(mass / mass.sum(), 1e-300))
        return {"log_weight": log_weight, "families": params["families"], "columns": columns}

    def log_weight(self, params: Params, u: Array) -> Array:
        out = np.tile(params["log_weight"], (len(u), 1))
        for k, family in self._parts(params):
            out += family.log_prob(params["columns"][k], u[:, k])
        return out

    def penalty(self, params: Params, rows: Rows) -> float:
        return sum(family.penalty(params["columns"][k]) for k, family in self._parts(params))

    def count(self, params: Params) -> int:
        own = sum(family.count(params["columns"][k]) for k, family in self._parts(params))
        return len(params["log_weight"]) - 1 + own

    def attributes(self, params: Params, scaling: Scaling) -> dict[str, Any]:
        return {"gate_families_": list(params["families"]), "gate_columns_": list(params["columns"])}

    def free(self, params: Params) -> Array:
        logits = params["log_weight"][:-1] - params["log_weight"][-1]
        own = [family.free(params["columns"][k]).ravel() for k, family in self._parts(params)]
        return np.concatenate([logits, *own])

    def restore(self, numbers: Array, like: Params) -> Params:
        num = len(like["log_weight"])
        logits = np.append(numbers[: num - 1], 0.0)
        at, columns = num - 1, []
        for k, family in self._parts(like):
            size = family.count(like["columns"][k])
            columns.append(family.restore(numbers[at : at + size].reshape(num, -1)))
            at += size
        log_weight = logits - np.logaddexp.reduce(logits)
        return {"log_weight": log_weight, "families": like["families"], "columns": columns}

    def gradient(self, rows: Rows, share: Array, params: Params) -> Array:
        weighted = rows.weight[:, None] * share
        by_weight = (weighted.sum(0) - rows.total * np.exp(params["log_weight"]))[:-1]
        own = [
            family.gradient(params["columns"][k], rows.u[:, k], weighted).ravel()
            for k, family in self._parts(params)
        ]
        return np.concatenate([by_weight, *own])

    def permute(self, params: Params, order: Array) -> Params:
        columns = [column[order] for column in params["columns"]]
        return {"log_weight": params["log_weight"][order], "families": params["families"], "columns": columns}
