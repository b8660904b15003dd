"""The notebook about transformers runs from top to bottom, and its numbers are what its words say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("plotly")
NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "seen_and_mended.py"
RUN = """
import json, os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))  # as `python FILE` does
_, made = runpy.run_path(sys.argv[1])["app"].run()
made = dict(made)
made["findings"] = [finding.name for finding in made["findings"]]
for name in ("collapse_figure", "loop_figure"):
    made[name] = [list(curve.y) for curve in made[name].data]
kept = ("findings", "crash", "mended_loss", "per_layer", "pooled", "healed", "same_alone", "same_replayed")
json.dump({name: made[name] for name in (*kept, "collapse_figure", "loop_figure")}, sys.stdout)
"""


def test_the_notebook_runs_and_computes_its_figures():
    """In a process of its own: where marimo is imported, transformers takes every program for a notebook."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(NOTEBOOK)], capture_output=True, text=True, check=False, timeout=300
    )
    if "No module named 'marimo'" in done.stderr:
        pytest.skip("marimo is not installed")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["findings"] == ["dead-router", "loss-off", "unaligned-sizes"]
    assert "16" in made["crash"]
    assert 3 < made["mended_loss"] < 6  # about ln 64 before training
    assert list(made["per_layer"].values()) == pytest.approx([4.0] * 4, abs=0.02)
    assert made["pooled"] == pytest.approx(1.0, abs=0.01)
    bars, line = made["collapse_figure"]
    assert bars == list(made["per_layer"].values())
    assert line == [made["pooled"]] * 4
    assert max(made["healed"].values()) < 2
    assert [curve[0] for curve in made["loop_figure"]] == pytest.approx([4.0] * 4, abs=0.02)
    assert len(made["loop_figure"][0]) == 40
    assert made["same_replayed"] == 1.0
    assert 0.5 < made["same_alone"] <= 1.0
