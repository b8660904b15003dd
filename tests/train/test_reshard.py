"""A checkpoint of processes arranged in one way loads in any other, and the next step is the same."""

import json
import os

import pytest
import torch
from oracles.arrangements import Arrangement, run_all
from torch.testing import assert_close

from moestro.train.checkpoint_files import DamagedCheckpoint, read_checkpoint
from moestro.train.fragments import Cut, Pieces, Span, piece_name, whole_name
from moestro.train.stored import StoredTensors

GRID = [
    Arrangement(),
    Arrangement(2, "data=2"),
    Arrangement(2, "expert=2"),
    Arrangement(4, "data=2,expert=2"),
    Arrangement(4, "expert=4"),
    Arrangement(2, "data=2", shard_optimiser=True),
    Arrangement(4, "data=2,expert=2", shard_optimiser=True),
    Arrangement(4, "data=2,tensor=2"),
    Arrangement(4, "expert=2,tensor=2", shard_optimiser=True),
    Arrangement(4, "data=2,expert=2", shard_dense=True),
    Arrangement(2, "data=2", shard_dense=True, shard_optimiser=True),
]
SMALL = [GRID[0], GRID[3], GRID[6], GRID[8], GRID[9]]


@pytest.mark.parametrize(
    ("arrangements", "method"),
    [
        pytest.param(SMALL, "deepseek-v3", id="small"),
        pytest.param(GRID, "deepseek-v3", marks=pytest.mark.nightly, id="grid"),
        pytest.param(GRID, "mixtral", marks=pytest.mark.nightly, id="mixtral"),
    ],
)
def test_every_arrangement_loads_what_every_other_saved(tmp_path, arrangements, method):
    run_all(tmp_path, arrangements, method)
    alone = json.loads((tmp_path / "save0.json").read_text())
    whole = len(read_checkpoint(tmp_path / "step-0").tensors)  # written by one process
    for number, source in enumerate(arrangements):
        steps = json.loads((tmp_path / f"save{number}.json").read_text())
        assert_close(exact(steps), exact(alone), rtol=1e-8, atol=1e-10, msg=source.name)
        for to, target in enumerate(arrangements):
            loaded = json.loads((tmp_path / f"load{number}to{to}.json").read_text())
            what = f"{source.name} to {target.name}"
            assert sum(bad for _, bad in loaded["same"]) == 0, what
            assert sum(good for good, _ in loaded["same"]) >= whole, what
            assert_close(exact(loaded["third"]), exact(steps[2]), rtol=1e-8, atol=1e-10, msg=what)
    said = json.loads((tmp_path / "guard.json").read_text())
    assert said.pop("full disk") == ["rank 2: No space left on device"] * 4  # and nothing is left
    bad_numbers(said)
    shards(tmp_path / f"step-{arrangements.index(GRID[3])}")


def exact(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def bad_numbers(said):
    """One process's bad number ends the step of all before the optimiser's, with one message."""
    named = {
        "weight": "first in weight of layers.1.moe.experts[3].down on rank 1)",
        "output": "first in output of layers.0.attention.output on rank 2)",
        "gradient": "first in gradient of layers.0.attention_norm.weight on rank 1)",
    }
    named |= {f"{kind}, dense shared": named[kind] for kind in ("weight", "output")}
    named["share"] = "first in weight of layers.0.attention.output.weight on rank 3)"
    assert said.keys() == named.keys()
    for kind, everyones in said.items():
        assert {message for message, _ in everyones} == {everyones[0][0]}
        assert named[kind] in everyones[0][0]
        assert all(kept for _, kept in everyones), kind


def shards(folder):
    """Files of a sharded checkpoint: every expert once by its global number, and damage named."""
    names = sorted(os.listdir(folder))
    assert "model-rank-1.safetensors" in names
    whole = read_checkpoint(folder)
    gates = [name for name in whole.tensors if whole_name(name) == "model.layers.0.moe.experts.gate"]
    assert sorted(gates) == [f"model.layers.0.moe.experts.gate[{expert}]" for expert in range(4)]
    shard = folder / "model-rank-1.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedCheckpoint, match=r"model-rank-1\.safetensors is damaged: the tensor model\.layers"):
        read_checkpoint(folder)
    shard.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"model-rank-1\.safetensors is missing"):
        read_checkpoint(folder)
    shard.write_bytes(data)
    (folder / "model-rank-9.safetensors").write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=r"model-rank-9\.safetensors does not belong there"):
        read_checkpoint(folder)
    (folder / "model-rank-9.safetensors").unlink()
    assert isinstance(read_checkpoint(folder).tensors, StoredTensors)


def test_pieces_are_put_together_and_a_missing_one_is_named():
    whole = torch.arange(24.0).view(2, 3, 4)
    saved = {f"model.gate[{row}]": whole[row] for row in range(2)} | {"model.norm": torch.ones(3)}
    cut = {
        piece_name("model.up", row, Cut(1, part, 2)): whole[row].chunk(2, 1)[part]
        for row in range(2)
        for part in range(2)
    }
    pieces = Pieces(saved | cut)
    assert pieces.names == {"model.gate", "model.norm", "model.up"}
    assert torch.equal(pieces.read("model.gate"), whole)
    assert torch.equal(pieces.read("model.up"), whole)
    assert torch.equal(pieces.read("model.up", 1, Cut(0, 2, 3)), whole[1, 2:])
    assert torch.equal(pieces.read("model.norm"), torch.ones(3))
    assert pieces.read("model.other") is None
    runs = {piece_name("model.wide", None, span=Span(*span)): whole[0, slice(*span)] for span in ((0, 2), (2, 3))}
    pieces = Pieces(runs)
    assert torch.equal(pieces.read("model.wide"), whole[0])
    assert torch.equal(pieces.read("model.wide", span=Span(1, 3)), whole[0, 1:])
    assert pieces.read("model.wide", span=Span(3, 3)).shape == (0, 4)
    assert torch.equal(Pieces({"model.wide": whole[0]}).read("model.wide", span=Span(1, 2)), whole[0, 1:2])
    del runs["model.wide{0:2}"]
    with pytest.raises(KeyError, match=r"model\.wide\{0:2\}|model\.wide\{0:3\}"):
        Pieces(runs).read("model.wide")
    del saved["model.gate[0]"], cut["model.up[1]{0of2@1}"]
    with pytest.raises(KeyError, match=r"model\.gate\[0\]"):
        Pieces(saved).read("model.gate")
    with pytest.raises(KeyError, match=r"model\.up\[1\]\{0of2@1\}"):
        Pieces(cut).read("model.up", 1)
