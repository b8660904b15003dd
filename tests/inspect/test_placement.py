"""What placing a run's experts would gain: the rows, the command, the picture and what is refused."""

import json

import numpy as np
import pytest
from oracles.entry import entry

from moestro.cli import main
from moestro.inspect.placement import run_placements
from moestro.parallel import Cluster


@pytest.fixture
def run(tmp_path):
    """Two layers whose hot experts sit side by side, with the noise of batches."""
    chance, folder = np.random.default_rng(0), tmp_path / "run"
    folder.mkdir()
    share = np.array([[0.3, 0.3, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05], [0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]])
    with (folder / "routing.jsonl").open("w") as file:
        for step in range(10, 210, 10):
            loads = [chance.multinomial(4096, each) / 4096 for each in share]
            layers = [{"name": f"layers.{i}.moe", "load": load.tolist()} for i, load in enumerate(loads)]
            file.write(json.dumps({"step": step, "layers": layers}) + "\n")
    return folder


@entry("eplb")
def test_the_summary_is_of_all_layers(method, run):
    found = run_placements(run, Cluster(4, slots=12))
    assert found.steps == (110, 200)
    assert list(found.layers) == ["layer 0", "layer 1"]
    rows = {row["policy"]: row for row in found.summary()}
    assert rows["contiguous"]["balancedness"] == pytest.approx((0.25 / 0.6 + 0.25 / 0.5) / 2, abs=0.01)
    assert rows["contiguous"]["speedup"] == pytest.approx(1)
    assert rows["refined"]["balancedness"] > 0.9
    busiest = [sum(found.layers[label][place].busiest for label in found.layers) for place in (0, -1)]
    assert rows["refined"]["speedup"] == pytest.approx(busiest[0] / busiest[1])
    assert rows["greedy"]["slots"] == 8
    assert rows["eplb"]["slots"] == 12


def test_the_command_prints_rows_and_draws_a_picture(run, tmp_path, capsys):
    words = ["placement", str(run), "--ranks", "4", "--slots", "12"]
    assert main([*words, "--picture", str(tmp_path / "load.png")]) == 0
    text = capsys.readouterr().out
    assert "measured on steps 110 to 200, which no policy had seen; 2 layers" in text
    assert "anti-correlation" in text
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"
    assert main([*words, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert sorted(set(plain["layers"]["layer 0"][-1]["placement"]["expert_of_slot"])) == list(range(8))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "3"], "8 experts cannot be shared evenly by 3 ranks"),
        (["--ranks", "4", "--slots", "10"], "10 slots cannot be shared evenly by 4 ranks; use 8 or 12 slots"),
        (["--ranks", "4", "--predictor", "oracle"], "unknown 'oracle'; there are last, sliding-average"),
        (["--ranks", "4", "--decide-at", "1"], "cannot be split at 1"),
        (["--ranks", "4", "--picture", "x.png", "--policy", "best"], "policy 'best' was not tried"),
    ],
)
def test_what_cannot_be_is_one_clear_line(run, capsys, words, message):
    assert main(["placement", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_run_is_said_before_a_missing_number(run, tmp_path, capsys):
    assert main(["placement", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["placement", str(run)]) == 2
    assert f"moestro placement {run} --ranks 4" in capsys.readouterr().err


def test_a_dense_run_has_nothing_to_place(tmp_path, capsys):
    (tmp_path / "result.json").write_text("{}")
    assert main(["placement", str(tmp_path), "--ranks", "2"]) == 2
    assert "has no routing records" in capsys.readouterr().err
