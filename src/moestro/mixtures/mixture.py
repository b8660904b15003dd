"""The model itself: a gate and experts with their numbers, `p(y|x) = sum_i g_i(x) f_i(y|x)`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moestro.mixtures.experts.base import Expert
from moestro.mixtures.gates.base import Gate, Params
from moestro.mixtures.numerics import Array, softmax_rows
from moestro.mixtures.rows import Rows


@dataclass(frozen=True)
class Mixture:
    """One value of all parameters, in standardised units."""

    gate: Gate
    expert: Expert
    gate_params: Params
    expert_params: Params

    @property
    def climbs(self) -> bool:
        """Whether an EM step can promise not to lower the objective."""
        return self.gate.climbs and self.expert.climbs

    def joint(self, u: Array, z: Array, y: Array) -> Array:
        """`log g_i(x) + log f_i(y|x)`, plus `log p(x|i)` under a generative gate. Shapes: `[rows, experts]`."""
        joint = self.gate.log_weight(self.gate_params, u)
        joint += self.expert.log_prob(self.expert_params, z, y)
        return joint

    def expected_joint(self, u: Array, z: Array, y: Array) -> Array:
        """`joint` as EM climbs it: for experts with a posterior of their own, its expectation."""
        joint = self.gate.log_weight(self.gate_params, u)
        joint += self.expert.expected_log_prob(self.expert_params, z, y)
        return joint

    def penalty(self, rows: Rows) -> float:
        """What the priors take from the monitored objective."""
        return self.gate.penalty(self.gate_params, rows) + self.expert.penalty(self.expert_params, rows)

    def share(self, u: Array) -> Array:
        """Gate probabilities `[rows, experts]`."""
        return np.exp(self.gate.log_proba(self.gate_params, u))

    def objective(self, rows: Rows) -> float:
        """Penalised log-likelihood that EM raises."""
        return float(rows.weight @ softmax_rows(self.expected_joint(rows.u, rows.z, rows.y))[0]) - self.penalty(
            rows
        )

    def free(self) -> Array:
        """All parameters as one vector of unconstrained numbers, gate first."""
        return np.concatenate([self.gate.free(self.gate_params), self.expert.free(self.expert_params)])

    def restore(self, numbers: Array) -> Mixture:
        """The same model with other numbers."""
        split = len(self.gate.free(self.gate_params))
        gate_params = self.gate.restore(numbers[:split], self.gate_params)
        return replace(
            self, gate_params=gate_params, expert_params=self.expert.restore(numbers[split:], self.expert_params)
        )

    def gradient(self, rows: Rows) -> Array:
        """Gradient of `objective` in the free numbers: by Fisher's identity the complete-data gradient at the
        posterior shares."""
        share = softmax_rows(self.expected_joint(rows.u, rows.z, rows.y))[1]
        by_gate = self.gate.gradient(rows, share, self.gate_params)
        mass = rows.weight[:, None] * share
        return np.concatenate([by_gate, self.expert.gradient(rows, mass, self.expert_params)])

    def count(self) -> int | None:
        """Free parameters; None where an expert does not say."""
        own = self.expert.count(self.expert_params)
        return None if own is None else self.gate.count(self.gate_params) + own

    def permute(self, order: Array) -> Mixture:
        """The same model with experts renumbered."""
        gate_params = self.gate.permute(self.gate_params, order)
        return replace(self, gate_params=gate_params, expert_params=self.expert.permute(self.expert_params, order))
