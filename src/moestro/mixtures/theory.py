"""Quantities of the theory of mixtures of experts, as plain functions."""

from __future__ import annotations

import numpy as np

from moestro.mixtures.numerics import Array


def voronoi_loss(
    weight: Array, gate: Array, expert: Array, true_weight: Array, true_gate: Array, true_expert: Array
) -> float:
    """Distance of two softmax-gated mixtures, blind to relabelling, shifts of the gate and split atoms.

        L1 = sum_j |sum_{i in A_j} w_i - w*_j| + sum_{|A_j| > 1} w_i (|Δv_ij|² + |Δη_ij|²)
             + sum_{|A_j| = 1} w_i (|Δv_ij| + |Δη_ij|)                        Nguyen, Ho & Rinaldo 2024

    A_j are the fitted atoms nearest to the true atom j in (gate vector, expert parameters) and w = exp(gate
    intercept). The gate's free shift is chosen among those that put an atom on the last true one.

    Shapes: weight `[atoms]` (positive), gate `[atoms, features]`, expert `[atoms, parameters]`; the truth likewise.
    """
    gate, true_gate = np.asarray(gate), np.asarray(true_gate)
    best = np.inf
    for anchor in range(len(weight)):  # the shift that makes some fitted atom coincide with the last true one
        shifted = gate - gate[anchor] + true_gate[-1]
        best = min(best, _cell_loss(weight, shifted, expert, true_weight, true_gate, true_expert))
    return best


def _cell_loss(
    weight: Array, gate: Array, expert: Array, true_weight: Array, true_gate: Array, true_expert: Array
) -> float:
    step = [np.linalg.norm(a[:, None] - b, axis=2) for a, b in ((gate, true_gate), (expert, true_expert))]
    cell = (step[0] ** 2 + step[1] ** 2).argmin(1)
    scale = true_weight.sum() / weight.sum()  # e^β0 is free up to a factor too
    total = 0.0
    for j in range(len(true_weight)):
        inside = np.flatnonzero(cell == j)
        power = 2 if len(inside) > 1 else 1
        total += abs(scale * weight[inside].sum() - true_weight[j])
        total += float((scale * weight[inside] * (step[0][inside, j] ** power + step[1][inside, j] ** power)).sum())
    return total


def sparse_moe_bound(
    n: Array | float,
    n_experts: Array | float,
    k: Array | float,
    natarajan_dim: Array | float,
    rademacher: Array | float,
    lipschitz: Array | float = 1.0,
    delta: Array | float = 0.05,
) -> Array:
    """Uniform generalisation bound of a sparse mixture of experts; teaching material, vacuous at real sizes.

        4 C R_n + 2 sqrt((2 k d_N (1 + log(E/k)) + d_N log 2n + log(4/δ)) / 2n)    Zhao, Wang & Wang 2024

    Args:
        n: rows.
        n_experts: experts E.
        k: experts per row.
        natarajan_dim: Natarajan dimension d_N of the router's masks.
        rademacher: Rademacher complexity of one expert's class.
        lipschitz: Lipschitz constant of the loss, which lies in [0, 1].
        delta: probability that the bound fails.
    """
    n, n_experts, k = (np.asarray(value, dtype=np.float64) for value in (n, n_experts, k))
    if np.any(k > n_experts) or np.any(k < 1):
        raise ValueError(f"k={k} must lie between 1 and n_experts={n_experts}")
    masks = 2 * k * natarajan_dim * (1 + np.log(n_experts / k))
    inside = (masks + natarajan_dim * np.log(2 * n) + np.log(4 / np.asarray(delta))) / (2 * n)
    return 4 * np.asarray(lipschitz) * rademacher + 2 * np.sqrt(inside)


def softmax_least_squares_rates(n: Array | float, strongly_identifiable: bool = True) -> dict[str, Array]:
    """Rates at which least squares of a softmax-gated mixture of experts learns, up to constants.

        function and exactly fitted atoms sqrt(log n / n), over-fitted atoms (log n / n)^(1/4)
                                                                                    Nguyen, Ho & Rinaldo 2024
    Experts are strongly identifiable when products of inputs with their derivatives in the parameters are linearly
    independent: one hidden layer of sigmoid or tanh with weights on the inputs. Polynomial and so linear experts,
    and experts that ignore the inputs, are not: no rate `n^(-1/2r)` holds for their parameters, and it may be as
    slow as `1 / log n`.

    Args:
        n: rows, at least 2.
        strongly_identifiable: of the experts.

    Returns:
        "function", "exact" (parameters of atoms fitted by one) and "over" (by several).
    """
    n = np.asarray(n, dtype=np.float64)
    if np.any(n < 2):
        raise ValueError(f"n={n} must be at least 2")
    base = np.sqrt(np.log(n) / n)
    if not strongly_identifiable:
        return {"function": base, "exact": 1 / np.log(n), "over": 1 / np.log(n)}
    return {"function": base, "exact": base, "over": np.sqrt(base)}
