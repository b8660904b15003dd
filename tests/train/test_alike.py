"""Processes that are not about to do the same are told apart before anything happens."""

import pytest
from oracles.odd_one_out import THEIRS
from oracles.ranks import run_ranks

from moestro.train.alike import code_fingerprint


def test_what_differs_and_in_which_rank_is_said_by_all():
    everyones = run_ranks("oracles.odd_one_out:compared", 3, 2)
    assert everyones[1:] == everyones[:1] * 2
    said = everyones[0]
    assert said.pop("nothing") == "nothing"
    assert said.keys() == THEIRS.keys()
    for what, named in {
        "recipe": "seed (0 there, 7 now)",
        "out": "out ('here' there, 'elsewhere' now)",
        "torch": "versions.torch (",
        "moestro": "versions.moestro (",
        "code": "code (",
        "text": "text ('the same' there, 'another' now)",
    }.items():
        assert said[what].startswith(f"rank 2 differs from rank 0: {named}"), said[what]
        assert said[what].endswith("; start all processes with the same recipe, data and code")


@pytest.mark.parametrize("change", ["edited", "added"])
def test_the_code_has_another_fingerprint_after_any_change(tmp_path, monkeypatch, change):
    (tmp_path / "moestro").mkdir()
    for name in ("__init__.py", "a.py"):
        (tmp_path / "moestro" / name).write_text("x = 1\n")
    monkeypatch.setattr("moestro.train.alike.moestro.__file__", str(tmp_path / "moestro" / "__init__.py"))
    before = code_fingerprint.__wrapped__()
    assert before == code_fingerprint.__wrapped__()
    (tmp_path / "moestro" / ("a.py" if change == "edited" else "b.py")).write_text("x = 2\n")
    assert code_fingerprint.__wrapped__() != before
