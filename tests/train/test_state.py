"""A checkpoint holds everything that decides the next step, whole or not at all."""

import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import moestro
from moestro.train.checkpoint_files import read_checkpoint, write_checkpoint
from moestro.train.optimiser import build_optimiser
from moestro.train.state import capture, restore


def fresh(seed=0, width=8):
    model = moestro.build_language_model(
        vocab_size=16,
        width=width,
        num_layers=2,
        num_heads=2,
        method="deepseek-v3",
        options={"top_k": 2},
        num_experts=4,
        expert_hidden=8,
        seed=seed,
    )
    return model, build_optimiser(model, learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95))


def train(model, optimiser, steps=3):
    log = moestro.RoutingLog(model)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(16, (2, 5))
        with log.recording():
            loss = model(tokens).float().logsumexp(-1).mean() + log.auxiliary_loss()
        loss = loss + random.random() + np.random.rand()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        log.update_controllers()
        losses.append(loss.item())
    log.close()
    return losses


def test_a_restored_run_goes_on_as_if_nothing_had_happened(tmp_path):
    model, optimiser = fresh()
    train(model, optimiser)
    write_checkpoint(tmp_path / "step", capture(model, optimiser, 3, 1.5, {"corpus": "x"}))
    expected = train(model, optimiser)

    other, its_optimiser = fresh(seed=1)
    checkpoint = read_checkpoint(tmp_path / "step")
    assert (checkpoint.step, checkpoint.seconds, checkpoint.fingerprint) == (3, 1.5, {"corpus": "x"})
    restore(checkpoint, other, its_optimiser)
    assert train(other, its_optimiser) == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_selection_bias_of_the_controllers_is_kept_in_float32(tmp_path):
    model, optimiser = fresh()
    train(model, optimiser)
    saved = capture(model, optimiser, 3, 0.0).tensors["model.layers.0.moe.router.select.bias"]
    assert saved.dtype == torch.float32
    assert saved.abs().max() > 0


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model, optimiser = fresh()
    checkpoint = capture(model, optimiser, 0, 0.0)
    assert [name for name in checkpoint.tensors if name in ("model.head.weight", "model.embedding.weight")] == [
        "model.embedding.weight"
    ]
    write_checkpoint(tmp_path / "step", checkpoint)
    restore(read_checkpoint(tmp_path / "step"), *(other := fresh(seed=1)))
    assert other[0].head.weight is other[0].embedding.weight
    assert_close(other[0].head.weight, model.head.weight)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    checkpoint = capture(*fresh(), 1, 0.0)
    with pytest.raises(ValueError, match=r"has \[16, 8\] .* for model\.embedding\.weight, the model \[16, 12\]"):
        restore(checkpoint, *fresh(width=12))
    checkpoint.tensors["model.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"holds model\.extra, which this model does not have"):
        restore(checkpoint, *fresh())
