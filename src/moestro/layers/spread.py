"""From a model of one process to this rank's share of one that many processes train."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moestro.experts import Experts
from moestro.experts.parallel import ParallelExperts, parallel_banks
from moestro.experts.replicas import join_replicas
from moestro.layers.moe import MoE
from moestro.parallel import Mesh, Network, Placement, Transport
from moestro.parallel.gradients import dense_squares, sum_gradients
from moestro.routers.output_gate import OutputGate


def spread(
    model: nn.Module,
    mesh: Mesh,
    *,
    transport: str | Transport = "linear",
    placement: Placement | None = None,
    slots: int | None = None,
    wire_dtype: torch.dtype | None = None,
) -> Network:
    """Spread the experts of every MoE layer of a model over the ranks of a mesh, in place.

    Every rank builds the whole model with the same weights (or on the meta device) and keeps its share of the
    experts; everything else stays on every rank. Controllers join their measures over all ranks from now on.

    Args:
        model: any module that holds MoE layers.
        mesh: ranks.
        transport: what carries rows; one instance serves all layers.
        placement: of every layer; None = in order.
        slots: physical experts of a layer on all ranks, the first replicated where there are more than experts;
            None = as the placement has it, or one for each expert.
        wire_dtype: of rows and gradients on the wire, e.g. `torch.bfloat16`; None = as they are.

    Returns: the wires, whose `traffic` counts what this rank sends.

    Raises:
        ValueError: experts that the ranks cannot share evenly without replicas, a bank that cannot be shared out,
            or a model without an MoE layer or with one spread already.
    """
    if placement is not None and slots is not None:
        raise ValueError("pass a placement or a number of slots, not both")
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError("this model has no MoE layer to spread; build one with moestro.build(...)")
    if any(True for _ in parallel_banks(model)):
        raise ValueError("the experts of this model are spread already; spread a model once")
    network, rank = Network(mesh, wire_dtype), mesh.experts.get_local_rank("expert")

    def make(bank: Experts) -> Experts:
        table = placement or Placement.in_turn(bank.num_experts, mesh.shape.expert, slots)
        local = bank.share(table.experts_of(rank))
        if mesh.shape.tensor > 1:
            local = local.slice(mesh.experts.get_local_rank("tensor"), mesh.shape.tensor)
        return ParallelExperts(local, mesh, table, transport, network)

    for moe in layers:
        moe.experts = moe.experts.replace_bank(make)
        for router in moe.router.modules():
            if isinstance(router, OutputGate):
                router.look_at(moe.experts)
        for controller in moe.controllers:
            controller.group = mesh.dense
    return network


class Gradients:
    """The gradients of a spread model over all ranks.

        loss.backward();  gradients.reduce();  norm = gradients.clip(1.0);  optimiser.step()

    Dense parameters add up over all ranks that see different tokens. An expert's gradient already holds the tokens
    of its `expert` group, so it adds up over `replicas` only, and over the slots of one expert. Both are divided by
    the same number, so that the result is the gradient of one loss (Liu et al. 2025). What FSDP2 shards over
    `mesh.tokens["dense"]` (`fully_shard` with the experts as `ignored_params`) it has averaged itself.

    Args:
        model: after `spread`.
        mesh: its ranks.
    """

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.mesh, self._banks = mesh, [bank for _, bank in parallel_banks(model)]
        of_experts = {id(p) for bank in self._banks for p in bank.parameters()}
        dense = [p for p in model.parameters() if id(p) not in of_experts]
        self._dense = [p for p in dense if not isinstance(p, DTensor)]
        self._sharded = [p for p in dense if isinstance(p, DTensor)]

    @torch.no_grad()
    def reduce(self, mean: bool = True) -> None:
        """Make every rank's gradients those of all ranks' losses together.

        Args:
            mean: the loss of all is the mean of the ranks' losses, as when each rank takes the mean over as many
                tokens; False = their sum, as when each divides by the tokens of all ranks.
        """
        divisor = self.mesh.shape.dense if mean else 1
        sum_gradients(self._dense, self.mesh.dense, 1 / divisor)
        for p in self._sharded:
            if p.grad is not None and not mean:
                p.grad.mul_(self.mesh.shape.dense)
        for bank in self._banks:
            sum_gradients(bank.parameters(), self.mesh.replicas, 1 / (divisor * bank.times_counted))
            join_replicas(bank)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The norm of the gradient of the whole model: everything once, wherever it is. After `reduce`."""
        dense = dense_squares([*self._dense, *self._sharded], self.mesh.dense)
        of_experts = [bank.squared_gradients().to(dense.device) for bank in self._banks]
        experts = torch.cat([dense.new_zeros(1), *of_experts])
        for group in (self.mesh.expert, self.mesh.tensor):
            dist.all_reduce(experts, group=group)
        return (dense + experts.sum()).sqrt()

    @torch.no_grad()
    def clip(self, most: float) -> Tensor:
        """Scale gradients so that their norm is at most `most`, as `torch.nn.utils.clip_grad_norm_` does.

        Returns: the norm before.
        """
        norm = self.norm()
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        for p in self._parameters():
            if p.grad is not None:
                p.grad.mul_(scale.to(p.grad.dtype))
        return norm

    def _parameters(self) -> Iterator[nn.Parameter]:
        yield from self._dense
        yield from self._sharded
        for bank in self._banks:
            yield from bank.parameters()
