"""Impossible arrangements are refused in one sentence; narrow wires and sharded dense weights work."""

import re

from oracles.ranks import run_ranks

MESSAGES = {
    "world": "2 processes do not fill a mesh of data=3.*start 3",
    "indivisible": "5 experts cannot be shared evenly by 2 ranks without replicas; spread them over 1, 5 ranks",
    "merging": "mixing parameters is not supported with expert parallelism; use expert=1",
    "no layer": "no MoE layer to spread",
    "twice": "spread a model once",
    "unknown": "unknown transport 'teleport'; choose one of .*capacity, ",
    "nothing to drop": "there is nothing to drop",
    "tokens inside": "take a transport of rows inside",
    "not stacked": "ModuleExperts is not stacked",
    "groups": "groups of 3 ranks do not divide the 2 ranks",
    "degree": "degree=3 does not fit 2 slices; choose one of 0, 1, 2",
    "slices of tokens": "take a transport of rows inside",
    "rows of slices": "to send them again, compute again too",
    "capacity": "slot 1 gets 3 rows but has capacity=2",
    "bias": "experts with bias cannot be sliced",
    "hidden": "hidden=5 cannot be cut into 2 equal slices",
    "no slices": "ConcatExperts cannot be sliced",
    "other ranks": "the placement is for 3 ranks but the mesh spreads over 2",
    "other number": "this rank has 3 experts but 2 slots",
}


def test_every_rank_hears_what_is_wrong_and_what_to_do() -> None:
    for told in run_ranks("oracles.refusals:tell", 2, seconds=60):
        for name, words in MESSAGES.items():
            assert re.search(words, told[name]), f"{name}: {told[name]}"
        assert 1e-6 < told["narrow"] < 0.1
        assert told["sharded"] < 1e-12
