"""Counts of all ranks: two gloo processes agree with one that has both batches."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.testing import assert_close

import moestro
from moestro.balance import GlobalBatchBalance, LoadTimesProbability, RoutingLog
from moestro.balance.quantile import gathered
from moestro.layers import MoE


def layer() -> MoE:
    torch.manual_seed(0)
    moe = moestro.build("qwen3", width=4, hidden=3, num_experts=6, top_k=2).double()
    torch.nn.init.normal_(moe.router.scorer.weight)
    return moe


def batches() -> Tensor:
    return torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    moe = layer()
    loss = GlobalBatchBalance()(moe.route(batches()[rank]))
    (gradient,) = torch.autograd.grad(loss, moe.router.scorer.weight)
    both = torch.cat([loss.detach().view(1), gradient.flatten()])
    dist.all_reduce(both)
    step_over_ranks_of_unequal_size(rank)
    dist.destroy_process_group()

    moe = layer()
    whole = LoadTimesProbability("megatron")(moe.route(batches().flatten(0, 1)))
    (expected,) = torch.autograd.grad(whole, moe.router.scorer.weight)
    assert_close(both / 2, torch.cat([whole.detach().view(1), expected.flatten()]))


def step_over_ranks_of_unequal_size(rank: int) -> None:
    """Rank 0 has two micro-batches, rank 1 a short one; the gradients of all ranks add up to the whole's."""
    x = batches()
    mine = [x[0, :3], x[0, 3:]] if rank == 0 else [x[1, :4]]
    moe = layer()
    log = RoutingLog(moe)
    totals = log.first_pass(partial(moe, part) for part in mine)
    for part in mine:
        with log.recording():
            moe(part)
        log.auxiliary_loss(totals).backward()
    gradient = moe.router.scorer.weight.grad
    dist.all_reduce(gradient)
    quantiles = gathered(torch.full((rank + 1, 2), float(rank)), dist.group.WORLD)
    assert quantiles.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]

    moe = layer()
    loss = moe.losses["balance"][0] * LoadTimesProbability("megatron")(moe.route(torch.cat([x[0], x[1, :4]])))
    assert_close(gradient, torch.autograd.grad(loss, moe.router.scorer.weight)[0])
    assert_close(log.losses(totals)["balance"], (loss / moe.losses["balance"][0]).detach())


def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
