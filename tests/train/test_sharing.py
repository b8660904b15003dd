"""Runs of several processes whose dense part is shared out, and runs whose last batch leaves one without text."""

import pytest
from oracles.ranks import run_ranks
from oracles.sharded_training import learners
from oracles.tiny_run import tiny_recipe
from safetensors.torch import load_file
from torch.testing import assert_close

from moestro.train import launch_run, train_run
from moestro.train.build import build_corpus, validation_batches
from moestro.train.files import read_lines
from moestro.train.progress import Silent


def test_a_run_and_its_twin_with_shared_dense_parts_are_those_of_one_process(tmp_path):
    how = {"precision": "float64", "options": {"top_k": 2}, "method": "deepseek-v3", "twin": True}
    recipe = tiny_recipe(tmp_path / "text.txt", accumulate=2, statistics="step", checkpoint_every=2, **how)
    one = train_run(recipe, tmp_path / "one", progress=Silent())
    shared = recipe.parallel.model_copy(update={"shard_dense": True, "mesh": "expert=2"})
    two = launch_run(recipe.model_copy(update={"parallel": shared}), tmp_path / "two", 2, progress="silent")
    for folder in ("", "twin"):
        first, second = (read_lines(tmp_path / run / folder / "metrics.jsonl") for run in ("one", "two"))
        for key in first[0].keys() - {"tokens_per_second"}:
            assert_close([r[key] for r in second], [r[key] for r in first], rtol=1e-9, atol=1e-9, msg=key)
        files = [tmp_path / run / folder / "model" / "model.safetensors" for run in ("one", "two")]
        first, second = map(load_file, files)
        assert first.keys() == second.keys()
        for name in first:
            assert_close(second[name], first[name], rtol=1e-8, atol=1e-8, msg=name)
    for first, second in ((one, two), (one["twin"], two["twin"])):  # evaluations take float32 logits
        assert_close(second["validation_loss"], first["validation_loss"], rtol=1e-7, atol=0)
    routing = [read_lines(tmp_path / run / "routing.jsonl") for run in ("one", "two")]
    norms = [[layer["router_grad_norm"] for record in each for layer in record["layers"]] for each in routing]
    assert_close(*norms, rtol=1e-9, atol=1e-12)


def test_a_last_batch_that_leaves_a_process_without_text_is_evaluated_in_bfloat16(tmp_path):
    recipe = tiny_recipe(tmp_path / "text.txt", precision="bfloat16", steps=2)
    corpus, size = build_corpus(recipe.data), recipe.train.batch_size
    *_, last = validation_batches(corpus.validation, size, recipe.data.sequence_length)
    assert len(last.tokens) == 1  # so that the second process has nothing
    shared = recipe.parallel.model_copy(update={"shard_dense": True, "mesh": "expert=2"})
    for name, run in {"whole": recipe, "shared": recipe.model_copy(update={"parallel": shared})}.items():
        found = launch_run(run, tmp_path / name, 2, progress="silent")
        alone = train_run(recipe, tmp_path / f"{name} alone", progress=Silent())
        assert found["validation_bytes"] == alone["validation_bytes"]
        assert_close(found["validation_loss"], alone["validation_loss"], rtol=2e-3, atol=0)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_every_method_learns_alike_with_a_shared_dense_part():
    methods = learners()
    assert len(methods) > 40
    for answer in run_ranks("oracles.sharded_training:every", 2, methods, seconds=1800):
        assert list(answer) == methods
        assert {name: apart for name, apart in answer.items() if not apart < 1e-9} == {}
