"""How many of scikit-learn's own checks each gate with each expert passes, as a table.

python benchmarks/estimator_checks.py                      all pairs and both samplers (about an hour)
python benchmarks/estimator_checks.py --gate kernel --expert linear elm
python benchmarks/estimator_checks.py --lines checks.txt   keeps a line per pair there and leaves out those it finds

A line says kind, expert, gate, checks passed, skipped and failed, seconds of processor time, and the last commit
that touched the mixtures, with a + where they are changed since. Ends with 1 where a check failed.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import sklearn
from sklearn.utils.estimator_checks import check_estimator

from moestro.mixtures import (
    DirichletProcessMixtureOfExpertsClassifier,
    DirichletProcessMixtureOfExpertsRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
)
from moestro.mixtures.experts import CLASSIFICATION_EXPERTS, REGRESSION_EXPERTS
from moestro.mixtures.gates import GATES

KINDS = {
    "regressor": (MixtureOfExpertsRegressor, REGRESSION_EXPERTS),
    "classifier": (MixtureOfExpertsClassifier, CLASSIFICATION_EXPERTS),
}
SAMPLERS = {
    "regressor": DirichletProcessMixtureOfExpertsRegressor(n_burn=5, n_samples=3, thin=1, n_chains=1),
    "classifier": DirichletProcessMixtureOfExpertsClassifier(n_burn=10, n_samples=5, n_chains=1),
}
Key = tuple[str, str, str]  # kind, expert, gate
ROOM = "src/moestro/mixtures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate", nargs="*", default=[*GATES, "sampler"])
    parser.add_argument("--expert", nargs="*", default=None)
    parser.add_argument("--lines", type=Path, default=None)
    options = parser.parse_args()
    done, now = read(options.lines), commit()
    for key, estimator in pairs().items():
        _, expert, gate = key
        wanted = gate in options.gate and (options.expert is None or expert in options.expert)
        if key in done or not wanted:
            continue
        done[key] = counts = [*checked(estimator), now]
        line = " ".join([*key, *counts])
        print(line, flush=True)
        if options.lines is not None:
            with options.lines.open("a") as file:
                file.write(line + "\n")
    print(table(done))
    sys.exit(int(any(counts[2] != "0" for counts in done.values())))


def commit() -> str:
    """The last commit that touched the mixtures, and a + where they are changed since."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        found = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    return git("log", "-1", "--format=%h", "--", ROOM) + ("+" if git("status", "--porcelain", ROOM) else "")


def pairs() -> dict[Key, Any]:
    """Every gate with every expert, and the samplers, by what they are called."""
    found: dict[Key, Any] = {}
    for kind, (estimator, experts) in KINDS.items():
        for expert in experts:
            for gate in GATES:
                found[kind, expert, gate] = estimator(gate=gate, expert=expert)
    for kind, sampler in SAMPLERS.items():
        found[kind, "process", "sampler"] = sampler
    return found


def checked(estimator: Any) -> list[str]:
    """Checks passed, skipped and failed, and seconds of processor time; prints what failed."""
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, on_fail=None)
    for result in results:
        if result["status"] == "failed":
            print(f"    {result['check_name']}: {result['exception']!s:.300}", flush=True)
    status = [result["status"] for result in results]
    counts = [str(status.count(name)) for name in ("passed", "skipped", "failed")]
    return [*counts, f"{time.process_time() - begin:.1f}"]


def read(path: Path | None) -> dict[Key, list[str]]:
    """What earlier runs found."""
    if path is None or not path.exists():
        return {}
    words = [line.split() for line in path.read_text().splitlines()]
    return {(kind, expert, gate): counts for kind, expert, gate, *counts in words}


def table(done: dict[Key, list[str]]) -> str:
    """Passed/failed of each pair, a dot where it has not been run, and the sums."""
    gates = list(GATES)
    lines = [
        "How many of scikit-learn's own estimator checks each expert passes under each gate: passed/failed.",
        f"scikit-learn {sklearn.__version__}, defaults of every part, no expected failure; a dot was not run.",
        "",
        " " * 24 + "".join(f"{gate:>20}" for gate in gates),
    ]
    for kind, (_, experts) in KINDS.items():
        for expert in experts:
            cells = [cell(done.get((kind, expert, gate))) for gate in gates]
            lines.append(f"{kind + ' ' + expert:<24}" + "".join(f"{text:>20}" for text in cells))
    for kind in SAMPLERS:
        lines.append(f"{kind + ' sampler':<24}{cell(done.get((kind, 'process', 'sampler'))):>20}")
    passed, skipped, failed, seconds = (sum(float(counts[k]) for counts in done.values()) for k in range(4))
    commits = Counter(counts[4] for counts in done.values())
    slowest = sorted(done, key=lambda key: -float(done[key][3]))[:3]
    lines += [
        "",
        f"{len(done)} of {len(pairs())} run: {passed:g} checks passed, {skipped:g} skipped, {failed:g} failed.",
        f"{seconds / 60:.0f} minutes of processor time on {platform.machine()}, one thread; slowest: "
        + ", ".join(f"{' '.join(key)} {float(done[key][3]):.0f} s" for key in slowest),
        "Commits: " + ", ".join(f"{name} ({count} run)" for name, count in commits.items()),
    ]
    return "\n".join(lines)


def cell(counts: list[str] | None) -> str:
    return "." if counts is None else f"{counts[0]}/{counts[2]}"


if __name__ == "__main__":
    main()
