"""Counts of all ranks: two gloo processes agree with one that has both batches."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.testing import assert_close

import moestro
from moestro.balance import GlobalBatchBalance, LoadTimesProbability
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
    dist.destroy_process_group()

    moe = layer()
    whole = LoadTimesProbability("megatron")(moe.route(batches().flatten(0, 1)))
    (expected,) = torch.autograd.grad(whole, moe.router.scorer.weight)
    assert_close(both / 2, torch.cat([whole.detach().view(1), expected.flatten()]))


def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
