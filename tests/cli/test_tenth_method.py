"""A method of another package, registered by an entry point, is a method like ours."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

METHOD = '''
from moestro.balance import LoadTimesProbability
from moestro.layers import MoE
from moestro.methods import method
from moestro.routers import Linear, Renormalised, TokenChoice, TopK, sigmoid


@method(title="A Tenth Method", paper="Nobody 2031", arxiv="3101.00001", family="token-choice")
def tenth(experts, *, top_k: int = 3, balance: float = 0.5) -> MoE:
    """The k best sigmoid scores, normalised."""
    scorer = Linear(experts.width, experts.num_experts)
    router = TokenChoice(scorer=scorer, gate=sigmoid, select=TopK(top_k), weigh=Renormalised())
    return MoE(router, experts, losses={"balance": (balance, LoadTimesProbability("switch"))})
'''

SCRIPT = """
from moestro.cli import main
assert main(["methods", "--json"]) == 0
print("====")
assert main(["show", "tenth", "--options.top-k", "2"]) == 0
print("====")
words = '''train --method tenth --model.options.top-k 2 --data.paths fox.txt --steps 2 --model.width 16
    --model.num-layers 1 --model.num-heads 2 --model.num-experts 4 --model.expert-hidden 16 --no-twin
    --data.sequence-length 16 --train.batch-size 2 --train.threads 1 --json'''.split()
assert main(words) == 0
"""


@pytest.fixture
def plugged(tmp_path: Path) -> dict[str, str]:
    """An environment in which the package of the tenth method is installed."""
    packages = tmp_path / "packages"
    info = packages / "moestro_tenth-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moestro-tenth\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moestro.methods]\ntenth = moestro_tenth\n")
    (packages / "moestro_tenth.py").write_text(METHOD)
    return {**os.environ, "PYTHONPATH": str(packages), "MOESTRO_CACHE": str(tmp_path / "cache")}


def run(arguments: list[str], cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_plug_in_is_found_shown_and_trained(tmp_path: Path, plugged: dict[str, str]) -> None:
    (tmp_path / "fox.txt").write_text("a quick brown fox jumps over a lazy dog. " * 60)
    methods, shown, trained = run(["-c", SCRIPT], tmp_path, plugged).split("====\n")
    row = next(row for row in json.loads(methods) if row["name"] == "tenth")
    assert (row["paper"], row["options"]["top_k"]["default"]) == ("Nobody 2031", 3)
    assert shown.startswith("tenth  Nobody 2031, arXiv:3101.00001  moestro_tenth.py")
    for line in ("select: TopK(k=2)", "weigh: Renormalised(", "balance = 0.5 * LoadTimesProbability", "(here 2)"):
        assert line in shown
    assert json.loads(trained)["method"] == "tenth"


def test_a_plug_in_is_held_to_the_conformance_tests(plugged: dict[str, str]) -> None:
    root = Path(__file__).parents[2]
    tests = ["tests/methods/test_conformance.py", "-k", "tenth", "-p", "no:cacheprovider", "-p", "no:xdist"]
    passed = re.search(r"(\d+) passed", run(["-m", "pytest", "-v", *tests], root, plugged))
    assert passed
    assert int(passed[1]) > 50
