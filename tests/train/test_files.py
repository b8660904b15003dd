"""The files of a run: lines that only grow, whole files or none."""

import json
import os

import pytest

from moestro.train.files import JsonLines, read_lines, write_json


def test_floats_read_back_bit_for_bit(tmp_path):
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, 2.0**-40]
    with JsonLines(tmp_path / "m.jsonl") as lines:
        for step, loss in enumerate(values):
            lines.append({"step": step, "loss": loss})
    assert [record["loss"].hex() for record in read_lines(tmp_path / "m.jsonl")] == [v.hex() for v in values]


def test_a_line_is_on_disk_as_soon_as_it_is_appended(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.append({"step": 1})
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 1}]
    lines.close()


def test_reopening_forgets_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with JsonLines(path, step=2) as lines:
        assert [record["step"] for record in lines.records] == [1, 2]
        lines.append({"step": 3, "again": True})
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_not_a_number_is_no_json(tmp_path):
    with JsonLines(tmp_path / "m.jsonl") as lines, pytest.raises(ValueError):
        lines.append({"step": 1, "loss": float("nan")})


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write_json(path, {"old": 1})

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["r.json"]
