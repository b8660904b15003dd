"""How many of scikit-learn's own checks each gate with each expert passes, as a table.

python benchmarks/estimator_checks.py                      all pairs (hours)
python benchmarks/estimator_checks.py --gate kernel --expert linear elm
"""

from __future__ import annotations

import argparse
import time
import warnings

import sklearn
from sklearn.utils.estimator_checks import check_estimator

from moestro.mixtures import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from moestro.mixtures.experts import CLASSIFICATION_EXPERTS, REGRESSION_EXPERTS
from moestro.mixtures.gates import GATES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate", nargs="*", default=list(GATES))
    parser.add_argument("--expert", nargs="*", default=None)
    options = parser.parse_args()
    print(f"scikit-learn {sklearn.__version__}, defaults of every part, no expected failure")
    print(f"{'kind':<12}{'gate':<20}{'expert':<14}{'passed':>8}{'skipped':>9}{'failed':>8}{'seconds':>9}")
    kinds = {
        "regressor": (MixtureOfExpertsRegressor, REGRESSION_EXPERTS),
        "classifier": (MixtureOfExpertsClassifier, CLASSIFICATION_EXPERTS),
    }
    for kind, (estimator, experts) in kinds.items():
        for expert in experts:
            if options.expert is not None and expert not in options.expert:
                continue
            for gate in options.gate:
                begin = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results = check_estimator(estimator(gate=gate, expert=expert), on_fail=None)
                status = [result["status"] for result in results]
                counts = [status.count(name) for name in ("passed", "skipped", "failed")]
                spent = time.perf_counter() - begin
                line = f"{kind:<12}{gate:<20}{expert:<14}{counts[0]:>8}{counts[1]:>9}{counts[2]:>8}{spent:>9.1f}"
                print(line, flush=True)
                for result in results:
                    if result["status"] == "failed":
                        print(f"    {result['check_name']}: {result['exception']!s:.300}", flush=True)


if __name__ == "__main__":
    main()
