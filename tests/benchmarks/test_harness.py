"""The benchmarks' shared module measures in turn, names what is missing and writes what it prints."""

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

HARNESS = Path(__file__).parents[2] / "benchmarks" / "harness.py"


@pytest.fixture
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness", HARNESS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_steps_take_turns_and_warm_up_rounds_do_not_count(harness: ModuleType) -> None:
    order: list[str] = []
    times = harness.all_times({name: lambda name=name: order.append(name) for name in "ab"}, 3, warm_up=1)
    assert order == list("ab" * 4)
    assert [len(each) for each in times.values()] == [3, 3]


def test_a_missing_peer_is_one_line(harness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.peer("no_such_library") is None
    assert capsys.readouterr().out == "no_such_library is not installed: its rows are left out\n"
    assert harness.peer("json") is json


def test_the_file_holds_the_rows_and_makes_the_table(harness: ModuleType, tmp_path: Path) -> None:
    arguments = argparse.Namespace(json=tmp_path / "out.json", threads=1, repeat=3)
    report = harness.Report("layer", arguments)
    report.add(shape="tiny", ratio=0.876)
    report.add(shape="odd", ratio=None)
    report.finish()
    document = json.loads(arguments.json.read_text())
    assert document["rows"] == [{"shape": "tiny", "ratio": 0.876}, {"shape": "odd", "ratio": None}]
    assert {"processor", "cores", "python", "torch"} == set(document["machine"])
    table = harness.markdown(document)
    assert "| tiny | 0.88 |" in table
    assert "| odd | - |" in table
