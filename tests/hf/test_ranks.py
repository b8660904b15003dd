"""Watched transformers models on several ranks: losses, router gradients and biases are those of one process."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hf.test_trainer import trained
from hf.tiny import tiny_batch, tiny_model
from safetensors.torch import load_file, save_file

import moestro
from moestro.hf import find_layers

pytest.importorskip("transformers")
Z = 0.1


def parts_of(rank, model):
    """A rank's micro-batches: ragged and padded ones, another number on each rank, and on rank 1 padding alone."""
    padding = tiny_batch(model, 2, 5)
    padding["attention_mask"].zero_()
    return [
        [tiny_batch(model, 2, 9, seed=0, padding=3), tiny_batch(model, 1, 5, seed=1)],
        [padding],
        [tiny_batch(model, 3, 4, seed=2)],
        [tiny_batch(model, 1, 7, seed=3, padding=6), padding, tiny_batch(model, 2, 6, seed=4)],
    ][rank]


def run(model, part):
    return model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])


def routers(model):
    return [next(layer.router.parameters()) for layer in find_layers(model).values()]


def of_one_process(model, parts):
    """Loss, router gradients and loads by the definition, from what stock routers answer on each part."""
    layers = find_layers(model)
    heard = {name: [] for name in layers}
    hooks = [
        layer.router.register_forward_hook(lambda module, given, out, name=name: heard[name].append(out))
        for name, layer in layers.items()
    ]
    for part in parts:
        run(model, part)
    for hook in hooks:
        hook.remove()
    valid = torch.cat([part["attention_mask"].flatten().bool() for part in parts])
    losses, loads = [], []
    for name, layer in layers.items():
        logits = torch.cat([answer[0] for answer in heard[name]])[valid]
        index = torch.cat([answer[2] for answer in heard[name]])[valid]
        scores = layer.family.gate(logits)
        shares = scores / scores.sum(-1, keepdim=True)
        load = torch.stack([(index == expert).sum() for expert in range(layer.num_experts)])
        balance = layer.num_experts * sum(
            load[expert] / index.numel() * shares[:, expert].mean() for expert in range(layer.num_experts)
        )
        losses.append(balance + Z * logits.logsumexp(-1).square().mean())
        loads.append(load)
    loss = sum(losses) / len(losses)
    return loss.detach(), torch.autograd.grad(loss, routers(model)), loads


def check_family(family, rank, world):
    """Every rank's shares add up to the loss and gradient of all tokens together."""
    rate = 0.001 if family == "deepseek_v3" else None
    model = tiny_model(family).double().train()
    log = moestro.watch(model, convention="megatron", z_loss=Z, bias_rate=rate)
    before = [layer.bias.clone() for layer in find_layers(model).values() if layer.bias is not None]
    mine = parts_of(rank, model)
    totals = log.first_pass(partial(run, model, part) for part in mine)
    shares = torch.zeros((), dtype=torch.float64)
    for part in mine:
        with log.recording():
            run(model, part)
        share = log.auxiliary_loss(totals)
        share.backward()
        shares += share.detach()
    gradients = [router.grad if router.grad is not None else torch.zeros_like(router) for router in routers(model)]
    for tensor in gradients:
        dist.all_reduce(tensor)
    if rate is not None:
        log.update_bias()
    fresh = tiny_model(family).double().train()
    loss, expected, loads = of_one_process(fresh, [part for each in range(world) for part in parts_of(each, fresh)])
    seen = log.losses(totals)
    assert float(seen["balance"] + Z * seen["z"]) == pytest.approx(float(loss), rel=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert theirs.abs().max() > 1e-4
        gap = float((ours - theirs).abs().max() / theirs.abs().max())
        assert gap <= 1e-6, (family, rank, gap)
    for layer, bias, load in zip(find_layers(model).values(), before, loads, strict=rate is not None):
        moved = bias + 0.001 * torch.sign(load.double().mean() - load).to(bias)
        assert torch.allclose(layer.bias.flatten(), moved.flatten(), atol=1e-7)


def work(rank, folder, world):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/meet", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for family in ("mixtral", "deepseek_v3"):
        check_family(family, rank, world)
    if world == 2:
        train_on_two_ranks(rank, folder)
    dist.destroy_process_group()


def train_on_two_ranks(rank, folder):
    """BalancedTrainer: the gradient of two ranks with two micro-batches each is that of one batch."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # the group is there already
    settings = {"balance": 5.0, "balance_z_loss": 0.1}
    trainer = trained(Path(folder) / str(rank), tiny_model("mixtral"), 2, 2, **settings)
    assert trainer.accelerator.num_processes == 2
    expected = load_file(Path(folder) / "whole.safetensors")
    for name, gradient in expected.items():
        ours = trainer.gradients[name]
        assert (ours - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-9, name


def spawn(folder, world, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(work, args=(str(folder), world), nprocs=world)


def test_two_ranks_are_one_process(tmp_path, monkeypatch):
    trainer = trained(tmp_path / "one", tiny_model("mixtral"), 8, 1, balance=5.0, balance_z_loss=0.1)
    save_file(trainer.gradients, tmp_path / "whole.safetensors")
    spawn(tmp_path, 2, monkeypatch)


@pytest.mark.nightly
@pytest.mark.timeout(900)  # four processes that import transformers on a busy machine of two cores
def test_four_ranks_are_one_process(tmp_path, monkeypatch):
    spawn(tmp_path, 4, monkeypatch)
