"""Seconds per EM iteration on a million rows, beside the matrix products that it cannot do without.

python benchmarks/mixtures.py --rows 1000000 --features 20 --experts 8
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_info

from moestro.mixtures import MixtureOfExpertsRegressor
from moestro.mixtures.fitting import em
from moestro.mixtures.gates import Effort
from moestro.mixtures.mixture import Mixture
from moestro.mixtures.numerics import Array, weighted_gram
from moestro.mixtures.rows import Rows


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Best of a few runs."""
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return float(best)


def planted(rows: int, features: int, experts: int) -> tuple[Array, Array]:
    """Random lines shared by a random softmax gate."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, features))
    label = (x @ rng.standard_normal((features, experts)) + rng.gumbel(size=(rows, experts))).argmax(1)
    y = np.einsum("td,dt->t", x, rng.standard_normal((features, experts))[:, label])
    return x, y + 0.5 * rng.standard_normal(rows)


def products(x: Array, experts: int) -> Callable[[], object]:
    """The products of one iteration with one Newton step: linear predictors, gradients and Gram matrices."""
    z = np.hstack([np.ones((len(x), 1)), x])
    wide = np.random.default_rng(0).random((len(x), experts))
    pairs = np.random.default_rng(0).random((len(x), experts * (experts - 1) // 2))
    small = np.random.default_rng(0).random((z.shape[1], experts))

    def run() -> None:
        for _ in range(4):  # gate and experts, before and after their step
            z @ small
        for _ in range(2):  # gradient of the gate, cross products of the experts
            z.T @ wide
        weighted_gram(z, pairs)
        weighted_gram(z, wide)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--experts", type=int, default=8)
    options = parser.parse_args()
    x, y = planted(options.rows, options.features, options.experts)
    threads = max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
    print(f"{platform.processor() or platform.machine()}, {threads} BLAS threads, numpy {np.__version__}")
    print(f"{options.rows} rows, {options.features} features, {options.experts} linear experts, softmax gate")
    model = MixtureOfExpertsRegressor(
        options.experts, algorithm="gem", init="segments", n_init=1, max_iter=2, random_state=0, tol=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        start = time.perf_counter()
        model.fit(x, y)
        print(f"{'fit of 2 iterations with its start':<38} {time.perf_counter() - start:8.3f} s")
    rows = model._rows_of(x, y, None)
    mixture = model.mixture_
    joint = mixture.joint(rows.u, rows.z, rows.y)
    value, share = em.share_softly(joint, 0, np.random.RandomState(0))
    del value
    effort = Effort(steps=1)
    parts = {
        "log-densities": lambda: mixture.joint(rows.u, rows.z, rows.y),
        "posterior shares": lambda: em.share_softly(joint, 0, np.random.RandomState(0)),
        "gate step": lambda: mixture.gate.m_step(rows, share, mixture.gate_params, effort),
        "experts' step": lambda: mixture.expert.m_step(rows, share, mixture.expert_params, effort),
    }
    total = 0.0
    for name, work in parts.items():
        spent = seconds(work)
        total += spent
        print(f"{name:<38} {spent:8.3f} s")
    floor = seconds(products(x, options.experts))
    print(f"{'one iteration':<38} {total:8.3f} s")
    print(f"{'its matrix products alone':<38} {floor:8.3f} s")
    print(f"{'ratio':<38} {total / floor:8.2f}")
    for name in ("gem", "em"):
        each = iterations(name, mixture, rows)
        text = ", ".join(f"{spent:.2f}" for spent in each)
        print(f"{'five iterations in a row, ' + name:<38} {np.mean(each):8.3f} s on average: {text}")


def iterations(name: str, mixture: Mixture, rows: Rows) -> Array:
    """Seconds of each of five iterations of a fit that goes on."""
    at: list[float] = []

    def note(iteration: int, objective: float) -> None:
        at.append(time.perf_counter())

    em.run(em.ALGORITHMS[name], mixture, rows, 0.0, 5, np.random.RandomState(0), note)
    return np.diff(at)


if __name__ == "__main__":
    main()
