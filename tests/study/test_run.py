"""A whole study in processes: what is kept, what fails alone, what stops and goes on."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moestro.inspect.leaderboard import leaderboard
from moestro.study import run_study
from moestro.study.display import Display
from moestro.study.pool import Work, run_all
from moestro.study.recipe import dump_study
from moestro.train.interrupt import Interrupt


def run(study, out, **options):
    lines = io.StringIO()
    return run_study(study, out, display=Display(lines), **options), lines.getvalue()


def test_a_study_from_end_to_end(tiny_study, tmp_path):
    out = tmp_path / "out"
    study = tiny_study(methods=["mixtral", {"method": "mixtral", "label": "broken", "options": {"top_k": 9}}])
    result, lines = run(study, out, workers=2)
    rows = {row["label"]: row for row in result["rows"]}
    assert set(rows) == {"dense", "mixtral", "broken"}
    assert (result["trainings"], result["settled"], result["tokens"]) == (2, 2, 4 * 4 * 16)
    assert rows["mixtral"]["speed"]["relative"] > 0
    assert rows["mixtral"]["difference"]["half_width"] is None  # one seed
    assert rows["mixtral"]["router_grad_norm"] > 0
    assert "top_k" in rows["broken"]["problem"]
    assert "broken cannot be built" in lines
    assert "2/2 · " in lines
    assert "bits per byte" in lines
    assert json.loads((out / "study.json").read_text()) == result
    page = (out / "study.html").read_text()
    assert "mixtral" in page
    assert 'src="http' not in page
    table = leaderboard([out])
    assert f"| {rows['mixtral']['rank']} | mixtral |" in table
    assert result["machine"]["processor"] in table

    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    again, lines = run(study, out)
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")} == before
    assert again["rows"] == result["rows"]
    assert "training" not in lines


def test_a_folder_of_something_else_is_refused(tiny_study, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "study.yaml").write_text(dump_study(tiny_study()))
    with pytest.raises(ValueError, match=r"another study: top_k \(2 there, 3 now\)"):
        run(tiny_study(top_k=3), out)
    with pytest.raises(ValueError, match="holds no study"):
        run(tiny_study(), tmp_path)
    with pytest.raises(ValueError, match="workers=0"):
        run(tiny_study(), tmp_path / "new", workers=0)
    with pytest.raises(ValueError, match="holds no study"):
        leaderboard([tmp_path])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="not the result of a study"):
        leaderboard([tmp_path / "other.json"])


def test_a_training_that_fails_is_a_row_that_says_why(tiny_study, tmp_path):
    result, lines = run(tiny_study(train={"learning_rate": 1e38, "clip": 0}), tmp_path / "out", workers=2)
    assert [row["rank"] for row in result["rows"]] == [None, None]
    for row in result["rows"]:
        assert "at step" in row["runs"][0]["problem"]
        assert "learning_rate" in row["runs"][0]["problem"]
        assert row["flags"] == ["failed with 1 of 1 seeds"]
    assert "FAILED" in lines


def test_a_process_that_dies_is_told_by_its_parent(tmp_path):
    content = {"task": "nonsense", "recipe": {}, "out": str(tmp_path / "x"), "failure": str(tmp_path / "f.json")}
    work = Work("one", tmp_path / "one.job.json", content, tmp_path / "one.log")
    with Interrupt() as interrupt, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(_dying(tmp_path)))
        assert run_all([work], 1, interrupt, lambda name: None, lambda name, seconds: None)
    assert json.loads((tmp_path / "f.json").read_text()) == {
        "problem": "its process ended with signal 9: last words"
    }
    assert not work.file.exists()


def _dying(folder: Path) -> Path:
    script = folder / "dying"
    script.write_text("#!/bin/sh\necho last words\nkill -9 $$\n")
    script.chmod(0o755)
    return script


def test_a_stopped_study_goes_on(tiny_study, tmp_path):
    study = tiny_study(train={"steps": 10**6, "evaluate_every": 10**6})
    (tmp_path / "study.yaml").write_text(dump_study(study))
    words = [sys.executable, "-m", "moestro", "study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
    metrics = tmp_path / "out" / "runs" / "dense" / "seed0" / "metrics.jsonl"

    def until_step(count: int) -> subprocess.Popen:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ))
        while not metrics.exists() or metrics.read_text().count("\n") < count:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        return process

    process = until_step(20)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"the same command goes on" in error
    saved = metrics.read_text().splitlines()
    assert (metrics.parent / "checkpoint").is_dir()

    process = until_step(len(saved) + 20)
    process.kill()  # nothing can be said any more, and still no worker stays behind
    process.communicate()
    deadline = time.monotonic() + 60
    while not (metrics.parent / "checkpoint" / f"step-{_steps(metrics):08d}").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert metrics.read_text().splitlines()[: len(saved)] == saved


def _steps(metrics: Path) -> int:
    lines = metrics.read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines else 0
