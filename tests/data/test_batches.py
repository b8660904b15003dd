import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.data import Batches, Share, write_tokens
from moestro.data.batches import permute


def counting(tmp_path, num_tokens, domain_size=7):
    """Token p stands at position p, in documents of `domain_size` tokens with alternating domains."""
    ids = np.arange(num_tokens)
    pieces = [(ids[i : i + domain_size], i // domain_size % 2, 0) for i in range(0, num_tokens, domain_size)]
    return write_tokens(tmp_path / "train.tokens", pieces, ids % 5)  # id p stands for p mod 5 bytes


def same(a, b):
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and a.num_bytes == b.num_bytes


@given(st.integers(1, 500), st.text(max_size=4))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permute_spreads_every_index_evenly():
    size, keys = 20, 4000
    seen = np.zeros((size, size))
    for key in range(keys):
        seen[np.arange(size), permute(np.arange(size), size, str(key))] += 1
    expected = keys / size
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert chi_square < 500  # 361 degrees of freedom: mean 361, deviation 27


def test_no_window_is_repeated_or_missed_within_an_epoch(tmp_path):
    batches = Batches(counting(tmp_path, 10 * 23 + 4), batch_size=4, length=10, seed=3)
    starts = torch.cat([batches.at(step).tokens[:, 0] for step in range(23)]).tolist()  # 4 epochs of 23 windows
    assert batches.batches_per_epoch == 6
    for epoch in range(4):
        assert sorted(starts[epoch * 23 : epoch * 23 + 23]) == list(range(0, 230, 10))
    assert starts[:23] != starts[23:46]
    assert starts[:23] != sorted(starts[:23])


def test_targets_are_the_next_tokens_and_domains_belong_to_the_tokens(tmp_path):
    file = counting(tmp_path, 300)
    batch = Batches(file, batch_size=4, length=10, seed=0).at(5)
    assert (batch.tokens.dtype, batch.targets.dtype, batch.domain.dtype) == (
        torch.int64,
        torch.int64,
        torch.uint8,
    )
    assert batch.tokens.shape == batch.targets.shape == batch.domain.shape == (4, 10)
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert torch.equal(batch.domain.long(), batch.tokens // 7 % 2)
    assert batch.num_bytes == (batch.targets % 5).sum()


def test_a_step_depends_on_seed_and_step_alone(tmp_path):
    file = counting(tmp_path, 1000)
    first = [Batches(file, 4, 10, seed=1).at(step) for step in range(60)]
    resumed = Batches(file, 4, 10, seed=1)
    for step in reversed(range(60)):  # in any order, from the middle of a run
        assert same(resumed.at(step), first[step])
    assert not same(Batches(file, 4, 10, seed=2).at(0), first[0])


def test_the_order_is_the_same_on_every_machine(tmp_path):
    """Recorded: a change here silently breaks the resumption of every earlier run."""
    batches = Batches(counting(tmp_path, 1001), 4, 10, seed=0)
    assert batches.at(0).tokens[:, 0].tolist() == RECORDED[0]
    assert batches.at(10**12).tokens[:, 0].tolist() == RECORDED[1]


RECORDED = ([540, 70, 870, 640], [580, 460, 30, 610])


@pytest.mark.parametrize("num_tokens", [2, 9, 10, 11, 12, 21, 81, 82, 85, 121])
def test_in_order_every_target_appears_once(tmp_path, num_tokens):
    batches = Batches(counting(tmp_path, num_tokens), batch_size=4, length=10, shuffle=False)
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    assert targets.tolist() == list(range(1, num_tokens))
    assert sum(batch.num_bytes for batch in batches) == sum(p % 5 for p in range(1, num_tokens))
    assert same(batches.at(batches.batches_per_epoch), batches.at(0))
    assert len(list(batches)) == batches.batches_per_epoch


def test_a_corpus_smaller_than_one_batch_is_refused(tmp_path):
    file = counting(tmp_path, 40)
    message = "train has 40 tokens, but one batch of 4 sequences of 10 needs 41; lower batch_size"
    with pytest.raises(ValueError, match=message):
        Batches(file, batch_size=4, length=10)
    assert Batches(counting(tmp_path, 41), batch_size=4, length=10).at(0).tokens.shape == (4, 10)
    with pytest.raises(ValueError, match="has 1 tokens, but at least 2 are needed"):
        Batches(counting(tmp_path, 1), batch_size=4, length=10, shuffle=False)


def test_bad_sizes_and_steps_are_refused(tmp_path):
    file = counting(tmp_path, 100)
    with pytest.raises(ValueError, match="at least 1"):
        Batches(file, batch_size=0, length=10)
    with pytest.raises(ValueError, match="steps count from 0"):
        Batches(file, batch_size=1, length=10).at(-1)


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_every_micro_batch_and_together_read_what_one_does(tmp_path, shuffle):
    file = counting(tmp_path, 10 * 23 + 4)
    whole = Batches(file, batch_size=8, length=10, seed=3, shuffle=shuffle)
    accumulate = 2 if shuffle else 1
    shares = [Batches(file, 8, 10, seed=3, shuffle=shuffle, share=Share(rank, 2, accumulate)) for rank in range(2)]
    for step in range(4):
        batch, parts = whole.at(step), [share.at(step) for share in shares]
        for micro, tokens in enumerate(batch.tokens.chunk(accumulate)):
            mine = [part.tokens.chunk(accumulate)[micro] if shuffle else part.tokens for part in parts]
            assert torch.equal(torch.cat(mine), tokens)
        assert sum(part.num_bytes for part in parts) == batch.num_bytes
