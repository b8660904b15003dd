"""Time to the same log-likelihood, beside R's flexmix: a softmax-gated mixture of lines from one start.

python benchmarks/flexmix.py --rows 20000 --features 5 --experts 3

Needs Rscript with the package flexmix (Debian: r-cran-flexmix); says so and stops where it is absent.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from moestro.mixtures import MixtureOfExpertsRegressor
from moestro.mixtures.numerics import Array

SCRIPT = """
suppressMessages(library(flexmix))
data <- read.csv("rows.csv")
names <- grep("^x", names(data), value = TRUE)
fit <- as.formula(paste("y ~", paste(names, collapse = " + ")))
gate <- as.formula(paste("~", paste(names, collapse = " + ")))
start <- proc.time()[["elapsed"]]
found <- flexmix(fit, data = data, k = max(data$label), cluster = data$label, model = FLXMRglm(),
                 concomitant = FLXPmultinom(gate), control = list(tolerance = 1e-6, iter.max = 500, minprior = 0))
seconds <- proc.time()[["elapsed"]] - start
cat(R.version.string, "flexmix", as.character(packageVersion("flexmix")), "\\n")
cat(sprintf("%.6f %.3f %d\\n", as.numeric(logLik(found)), seconds, found@iter))
"""


def planted(rows: int, features: int, experts: int) -> tuple[Array, Array, Array]:
    """Random lines shared by a random softmax gate, and a poor first guess of who explains what."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, features))
    label = (x @ rng.standard_normal((features, experts)) + rng.gumbel(size=(rows, experts))).argmax(1)
    y = np.einsum("td,dt->t", x, rng.standard_normal((features, experts))[:, label]) + 0.5 * rng.standard_normal(
        rows
    )
    guess = np.where(rng.random(rows) < 0.5, label, rng.integers(0, experts, rows))
    return x, y, guess


def flexmix(x: Array, y: Array, guess: Array) -> tuple[str, float, float, int] | None:
    """Version, log-likelihood, seconds and iterations of R; None without R."""
    if shutil.which("Rscript") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        header = ",".join([*(f"x{k}" for k in range(x.shape[1])), "y", "label"])
        table = np.column_stack([x, y, guess + 1])
        np.savetxt(Path(folder) / "rows.csv", table, delimiter=",", header=header, comments="", fmt="%.17g")
        done = subprocess.run(["Rscript", "-e", SCRIPT], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "Rscript failed without a word")
        return None
    version, numbers = done.stdout.strip().splitlines()[-2:]
    loglik, seconds, steps = numbers.split()
    return version.strip(), float(loglik), float(seconds), int(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=5)
    parser.add_argument("--experts", type=int, default=3)
    options = parser.parse_args()
    x, y, guess = planted(options.rows, options.features, options.experts)
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}")
    print(f"{options.rows} rows, {options.features} features, {options.experts} linear experts, softmax gate")
    theirs = flexmix(x, y, guess)
    if theirs is None:
        print("flexmix is not installed here (Debian: apt install r-cran-flexmix); nothing to compare with")
        return
    print(f"{theirs[0]:<44} log-likelihood {theirs[1]:14.4f} in {theirs[2]:8.3f} s, {theirs[3]} iterations")
    for algorithm in ("em", "gem"):
        ours(algorithm, x, y, np.eye(options.experts)[guess], theirs)


def ours(algorithm: str, x: Array, y: Array, start: Array, theirs: tuple[str, float, float, int]) -> None:
    """Best of three fits that end no lower than R's, and how much faster they are."""
    for tol in (1e-6, 1e-7, 1e-8):
        model = MixtureOfExpertsRegressor(start.shape[1], init=start, algorithm=algorithm, tol=tol)
        seconds = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for _ in range(3):
                begin = time.perf_counter()
                model.fit(x, y)
                seconds.append(time.perf_counter() - begin)
        if model.loglik_ >= theirs[1]:
            break
    name, times = f"moestro, algorithm={algorithm!r}, tol={tol:g}", theirs[2] / min(seconds)
    text = f"{name:<44} log-likelihood {model.loglik_:14.4f} in {min(seconds):8.3f} s, {model.n_iter_} iterations"
    print(f"{text}: {times:.1f} times faster")


if __name__ == "__main__":
    main()
