"""What a run says of its processes: how many there are, and which settings change nothing with so many."""

import pytest
from oracles.tiny_run import tiny_recipe

from moestro.cli import main
from moestro.parallel import MeshShape
from moestro.train import train_run
from moestro.train.build import build_model
from moestro.train.company import company
from moestro.train.progress import Silent


class Heard(Silent):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def said(tmp_path, shape, method="mixtral", **parallel):
    recipe = tiny_recipe(tmp_path / "text.txt", method=method)
    section = type(recipe.parallel).model_validate(parallel)
    recipe = recipe.model_copy(update={"parallel": section})
    model = build_model(recipe.model, vocab_size=16, sequence_length=16, seed=0)
    return [line for line in company(recipe, model, shape) if "no effect" in line]


ALONE = "in one process; start several with --processes N"


@pytest.mark.parametrize(
    ("shape", "method", "parallel", "expected"),
    [
        (None, "mixtral", {}, []),
        (None, "mixtral", {"mesh": "data=1"}, []),
        (None, "mixtral", {"shard_dense": True}, [f"parallel.shard_dense has no effect {ALONE}"]),
        (None, "mixtral", {"shard_optimiser": True}, [f"parallel.shard_optimiser has no effect {ALONE}"]),
        (
            None,
            None,
            {"transport": "leader", "shard_dense": True, "timeout": 9},
            [f"parallel.transport, parallel.shard_dense and parallel.timeout have no effect {ALONE}"],
        ),
        (MeshShape(expert=2), "mixtral", {"transport": "leader", "shard_dense": True, "timeout": 9}, []),
        (MeshShape(data=2), "mixtral", {"shard_optimiser": True, "shard_dense": True}, []),
        (
            MeshShape(data=2),
            "mixtral",
            {"transport": "leader"},
            ["parallel.transport has no effect where data=2 x expert=1 x tensor=1 gives every process all experts"],
        ),
        (
            MeshShape(expert=2),
            None,
            {"transport": "leader", "mesh": "expert=2"},
            ["parallel.mesh and parallel.transport have no effect on a dense model"],
        ),
        (MeshShape(data=2), None, {"mesh": "data=2", "shard_dense": True}, []),
        (
            MeshShape(expert=2),
            "mixtral",
            {"shard_optimiser": True, "shard_dense": True},
            ["parallel.shard_optimiser has no effect besides shard_dense, which shares out what it would"],
        ),
    ],
)
def test_what_has_no_effect_is_said(tmp_path, shape, method, parallel, expected):
    assert said(tmp_path, shape, method, **parallel) == expected


def test_a_run_of_one_process_says_it_once(tmp_path):
    recipe, heard = tiny_recipe(tmp_path / "text.txt", steps=2), Heard()
    section = recipe.parallel.model_copy(update={"shard_dense": True, "shard_optimiser": True})
    train_run(recipe.model_copy(update={"parallel": section}), tmp_path / "run", progress=heard)
    assert [line for line in heard.lines if "no effect" in line] == [
        f"parallel.shard_optimiser and parallel.shard_dense have no effect {ALONE}"
    ]


def test_a_shared_dense_part_that_is_to_be_compiled_is_a_wrong_usage(tmp_path, capsys):
    words = ["--parallel.shard-dense", "--train.compile", "--processes", "2", "--out", str(tmp_path / "run")]
    assert main(["train", *words]) == 2
    assert "train.compile does not know a dense part that is shared out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
