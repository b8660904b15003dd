"""A study small enough to be run in a test: one layer, width 16, a page of text."""

import pytest
from oracles.tiny_run import TEXT

from moestro.study import StudyRecipe


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny_study(tmp_path):
    """A function of methods and further values that answers a study."""
    text = tmp_path / "fox.txt"
    text.write_text(TEXT, encoding="utf-8")

    def study(methods=("mixtral",), seeds=(0,), train=None, **values) -> StudyRecipe:
        sizes = {"num_experts": 4, "expert_hidden": 16, "width": 16, "num_layers": 1, "num_heads": 2}
        steps = {"steps": 4, "batch_size": 4, "evaluate_every": 2, "evaluation_batches": 2, "log_every": 1}
        fixed = {"threads": 1, "precision": "float32", "device": "cpu"}
        return StudyRecipe.model_validate(
            {
                "methods": methods,
                "seeds": seeds,
                "model": sizes,
                "data": {"paths": [str(text)], "sequence_length": 16},
                "train": {**steps, **fixed, **(train or {})},
                **values,
            }
        )

    return study
