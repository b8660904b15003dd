"""A decoder whose dense part is sharded learns as one process does."""

import pytest
from oracles.ranks import run_ranks

from moestro.layers.sharding import shard_dense
from moestro.parallel import MeshShape


def test_a_sharded_dense_part_learns_as_one_process_and_takes_a_share_of_memory():
    for found in run_ranks("oracles.sharded_training:trained", 2, [{"expert": 2}, {"data": 2}]):
        for each in found:
            assert each["numbers"] < 1e-10
            assert each["weights"] < 1e-10
            assert each["share"] == pytest.approx(0.5, abs=0.05)
            assert each["state"] == each["share"]


def test_one_block_at_a_time_is_put_together_and_single_numbers_stay():
    for found in run_ranks("oracles.sharded_training:together", 2):
        assert found["whole"] == [[0], [1]]
        assert found["between"] == found["after"] == ["temperature"]


def test_copies_of_the_dense_part_are_not_sharded():
    mesh = type("Mesh", (), {"shape": MeshShape(expert=2, copies=2)})()
    with pytest.raises(ValueError, match="copies=2: ranks that hold the same tokens split"):
        shard_dense(None, mesh)
