"""A process's part in a run: what it holds of the model, what it exchanges, and what of it it writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from moestro.balance import RoutingLog
from moestro.experts.parallel import parallel_banks
from moestro.inspect import LayerTally, record_of, tally_of
from moestro.layers import MoE, spread
from moestro.layers.sharding import shard_dense
from moestro.models import DecoderLM, build_language_model
from moestro.parallel import Mesh
from moestro.train.exchange import Exchange, Exchanging, NoExchange
from moestro.train.fragments import Fragment, Origins, Pieces, fragments_of, model_tensors, origins_of
from moestro.train.recipe import ParallelSection
from moestro.train.team import ALONE, Team


class Part:
    """What one process holds of a model, and does; see `take_part`.

    Attributes:
        team: the processes of the run.
        mesh: how they are arranged; None = this one is alone.
        shapes: of every tensor of the whole model, by name.
        exchange: what a step needs of the other processes.
    """

    def __init__(
        self,
        team: Team,
        mesh: Mesh | None,
        shapes: Mapping[str, torch.Size],
        origins: Origins,
        exchange: Exchange,
        keeper: Mapping[int, int],
    ) -> None:
        self.team, self.mesh, self.shapes, self.exchange = team, mesh, shapes, exchange
        self._origins, self._keeper = origins, keeper

    def keeps(self, parameter: nn.Parameter) -> bool:
        """Whether this process keeps the optimiser's state of a parameter, and steps it."""
        return self._keeper.get(id(parameter), self.team.rank) == self.team.rank

    def fragments(self, model: nn.Module) -> list[Fragment]:
        """What this process holds of the whole model now; experts may have moved since the last call."""
        return fragments_of(model, self._origins)

    def writes(self, fragment: Fragment) -> bool:
        """Whether this process, of those that hold a fragment, is the one to write it."""
        if fragment.span is not None:
            return fragment.span.end > fragment.span.first
        if not fragment.of_expert or self.mesh is None:
            return self.team.first
        return fragment.counts and self.mesh.experts.get_local_rank("data") == 0

    def writes_state(self, fragment: Fragment) -> bool:
        """Whether it is the one to write what the optimiser keeps for a fragment."""
        keeper = self._keeper.get(id(fragment.tensor))
        return self.writes(fragment) if keeper is None else keeper == self.team.rank and fragment.counts

    def routing_record(self, step: int, log: RoutingLog) -> dict[str, Any]:
        """What routers did in the last micro-batch, over all processes; see `moestro.inspect.routing_record`."""
        tallies = {name: tally_of(decisions) for name, decisions in log.decisions.items()}
        if self.team.size > 1:
            packed = {name: self.team.summed(tally.packed()) for name, tally in tallies.items()}
            tallies = {name: LayerTally.unpacked(numbers) for name, numbers in packed.items()}
        return record_of(step, tallies)

    @torch.no_grad()
    def whole(self, model: DecoderLM) -> DecoderLM:
        """The model with what all processes hold of it, in the first; elsewhere what is there."""
        fragments = self.fragments(model)
        if not any(each.of_expert or each.span is not None for each in fragments):
            return model
        mine = {each.key: each.of(each.tensor) for each in fragments if self.writes(each)}
        said = self.team.gather([[key, list(tensor.shape)] for key, tensor in mine.items()])
        if not self.team.first:
            for tensor in mine.values():
                dist.send(tensor.contiguous(), 0)
            return model
        like = model.embedding.weight
        for rank in range(1, self.team.size):
            for key, shape in said[rank]:
                mine[key] = torch.empty(shape, dtype=like.dtype, device=like.device)
                dist.recv(mine[key], rank)
        complete = build_language_model(**model.config).to(like.device, like.dtype)
        pieces = Pieces(mine)
        for name, tensor in model_tensors(complete).items():
            value = pieces.read(name)
            assert value is not None
            tensor.copy_(value)
        return complete


def take_part(
    model: nn.Module, team: Team = ALONE, mesh: Mesh | None = None, settings: ParallelSection | None = None
) -> Part:
    """Make a model, which every process has built alike, this process's part of it, in place.

    Args:
        model: with the same weights everywhere.
        team: the processes.
        mesh: how they are arranged; None = one process alone.
        settings: the recipe's.

    Raises:
        ValueError: experts that cannot be spread so.
    """
    shapes = {name: tensor.shape for name, tensor in model_tensors(model).items()}
    if mesh is None or settings is None:
        return Part(team, None, shapes, {}, NoExchange(), {})
    origins = origins_of(model)
    if any(isinstance(module, MoE) for module in model.modules()):
        spread(model, mesh, transport=settings.transport, slots=settings.placement.slots)
    if settings.shard_dense:
        shard_dense(model, mesh, model.blocks if isinstance(model, DecoderLM) else ())
    keeper = _keepers(model, mesh) if settings.shard_optimiser else {}
    return Part(team, mesh, shapes, origins, Exchanging(team, mesh, model, keeper), keeper)


def _keepers(model: nn.Module, mesh: Mesh) -> dict[int, int]:
    """Which process, of those that hold it, keeps the optimiser's state of each parameter: evenly by size.

    After Rajbhandari et al. 2020 ("ZeRO"), stage 1, a whole parameter at a time. What is sharded has no keeper:
    every process steps its share.

    Raises:
        ValueError: more processes than parameters to share out.
    """
    of_experts = {id(p) for _, bank in parallel_banks(model) for p in bank.parameters()}
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
    sharded = len(whole) < len(list(model.parameters()))
    keeper: dict[int, int] = {}
    for group, inside in ((mesh.dense, False), (mesh.replicas, True)):
        load = dict.fromkeys(dist.get_process_group_ranks(group), 0)
        parameters = [p for p in whole if (id(p) in of_experts) == inside]
        for parameter in sorted(parameters, key=lambda p: -p.numel()):
            lightest = min(load, key=lambda rank: (load[rank], rank))
            keeper[id(parameter)] = lightest
            load[lightest] += parameter.numel()
        if not (inside or sharded or all(load.values())):
            raise ValueError(f"too few parameters for {len(load)} processes; leave parallel.shard_optimiser out")
    return keeper
