"""Hash Layers against their definition: Roller et al. 2021."""

import pytest
import torch
from oracles import papers
from oracles.harness import build, check_layer, random_case
from torch.testing import assert_close

import moestro
from moestro.routing import Context


def hash_layers(**options):
    sizes = {"width": 5, "hidden": 4, "num_experts": 4, "vocab_size": 20} | options
    return moestro.build("hash-layers", **sizes).double()


def ids(*values):
    return Context(token_ids=torch.tensor(values))


@pytest.mark.parametrize("seed", range(42))
def test_hash_layers_follow_their_equations(seed):
    case = random_case(seed)
    layer = build("hash-layers", case, vocab_size=6, seed=seed)
    token_ids = torch.randint(6, (case.num_tokens,))
    context = Context(token_ids=token_ids, valid=case.valid)
    table = layer.router.tables[0].tolist()

    def slow(twin, x, _):
        return papers.hash_layers(x, token_ids.tolist(), table, twin.experts, case.valid_list)

    check_layer(layer, case, slow, context)


def test_hash_layers_same_id_same_expert_at_every_step():
    layer, x = hash_layers(), torch.randn(3, 5, dtype=torch.float64)
    for _ in range(2):
        first, second, third = layer.route(torch.randn_like(x), ids(7, 3, 7)).notes["choice"][:, 0].tolist()
        assert first == third == int(layer.router.tables[0, 7])
        assert second == int(layer.router.tables[0, 3])
        layer.train()


def test_hash_layers_router_has_nothing_to_learn_and_weight_one():
    layer, x = hash_layers(), torch.randn(3, 5, dtype=torch.float64)
    assert not list(layer.router.parameters())
    assert layer.losses == {}
    combine = layer.route(x, ids(7, 3, 7)).routing.combine_matrix()
    assert sorted(combine.flatten().tolist()) == [0.0] * 9 + [1.0] * 3


@pytest.mark.parametrize("num_experts", [1, 2, 3, 7])
def test_hash_layers_balanced_table_differs_by_at_most_the_most_frequent_id(num_experts):
    counts = [float(c) for c in torch.randint(1, 90, (20,)).tolist()]
    layer = hash_layers(num_experts=num_experts, table="balanced", frequencies=counts)
    load = [0.0] * num_experts
    for token_id, expert in enumerate(layer.router.tables[0].tolist()):
        load[expert] += counts[token_id]
    assert max(load) - min(load) <= max(counts)


def test_hash_layers_random_table_comes_from_its_seed():
    layer, same, other = (hash_layers(seed=seed).router.tables.tolist() for seed in (42, 42, 43))
    assert layer == same != other
    assert "router.tables" in hash_layers().state_dict()


def test_hash_layers_with_one_expert_are_the_dense_network():
    layer, x = hash_layers(num_experts=1), torch.randn(3, 5, dtype=torch.float64)
    dense = layer.experts.dense().double()
    for name, parameter in dense.named_parameters():
        parameter.data = getattr(layer.experts, name).data[0]
    assert_close(layer(x, ids(7, 3, 7)), dense(x))


def test_hash_layers_with_equal_tables_reduce_to_one_hash():
    """MultiHash: N segments of one expert, chosen alike, are that expert."""
    counts = [float(c) for c in range(20, 0, -1)]
    single = hash_layers(num_experts=4, hidden=6, activation="relu", table="balanced", frequencies=counts)
    multi = hash_layers(
        num_experts=8, hidden=3, activation="relu", table="balanced", frequencies=counts, num_hashes=2
    )
    for segment in range(2):
        here, there = slice(4 * segment, 4 * segment + 4), slice(3 * segment, 3 * segment + 3)
        multi.experts.up.data[here] = single.experts.up.data[:, :, there]
        multi.experts.down.data[here] = single.experts.down.data[:, there, :]
    x = torch.randn(6, 5, dtype=torch.float64)
    assert_close(multi(x, ids(0, 5, 9, 3, 3, 19)), single(x, ids(0, 5, 9, 3, 3, 19)))


def test_hash_layers_padding_may_carry_any_id():
    layer, x = hash_layers(), torch.randn(2, 5, dtype=torch.float64)
    y = layer(x, Context(token_ids=torch.tensor([3, -100]), valid=torch.tensor([True, False])))
    assert_close(y[:1], layer(x[:1], ids(3)))
    assert y[1].tolist() == [0.0] * 5


def test_hash_layers_say_what_they_need():
    with pytest.raises(ValueError, match="token_ids"):
        hash_layers()(torch.randn(3, 5, dtype=torch.float64))
