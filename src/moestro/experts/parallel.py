"""Experts spread over ranks: a bank like any other, whose rows travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moestro.experts.base import Experts
from moestro.experts.single import FeedForward
from moestro.kernels import as_autocast
from moestro.parallel import Mesh, Network, Placement, TokenTransport, Transport, Trip, make_transport
from moestro.routing import MergeRouting, Routing, SparseRouting


class ParallelExperts(Experts):
    """A bank whose experts are spread over the ranks of a mesh; every rank calls it at the same time.

        rows -> slots of all ranks -> transport -> local experts -> transport -> rows

    Any rank may have no token, any expert no row. The gradients of the local experts are sums over the tokens of
    the `expert` group; what remains is to add them up over `replicas`, see `moestro.layers.Gradients`.

    Args:
        local: this rank's experts, one per slot, in the order of the placement.
        mesh: ranks.
        placement: which slot holds which expert; None = in order, without replicas.
        transport: name of one, or one.
        network: wires of the mesh, where layers share them; None = wires of its own, that carry rows as they are.

    Raises:
        ValueError: a bank of other size than the placement says, a placement for other ranks, an unknown transport
            or one that cannot run on this mesh.

    Attributes:
        local: see above.
        num_experts: logical experts of all ranks.
    """

    def __init__(
        self,
        local: Experts,
        mesh: Mesh,
        placement: Placement | None = None,
        transport: str | Transport = "linear",
        network: Network | None = None,
    ) -> None:
        super().__init__()
        ranks = mesh.shape.expert
        placement = placement or Placement.contiguous(local.num_experts * ranks, ranks)
        if placement.ranks != ranks:
            raise ValueError(f"the placement is for {placement.ranks} ranks but the mesh spreads over {ranks}")
        if local.num_experts != placement.slots_per_rank:
            raise ValueError(
                f"this rank has {local.num_experts} experts but {placement.slots_per_rank} slots; hand over the "
                "experts of its slots only, as bank.share(placement.experts_of(rank)) does"
            )
        self.local, self.network, self.placement = local, network or Network(mesh), placement
        self.num_experts, self.width = placement.num_experts, local.width
        self.transport = make_transport(transport)
        self.transport.check(self.network, local)

    @property
    def out_width(self) -> int:
        return self.local.out_width

    @property
    def times_counted(self) -> int:
        """How often the gradient of the experts counts each token: by every rank that holds and sends it."""
        return 1 if self.transport.drops_copies else self.network.mesh.shape.copies

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        order, load = self._by_slot(offsets)
        trip = Trip(self.network, self.local, rows.device)
        if order is None:
            return self.transport.carry(trip, rows, load)
        out = self.transport.carry(trip, rows.index_select(0, order), load)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return out.index_select(0, back)

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        if isinstance(routing, MergeRouting):
            self.merged(routing.mixture, x, routing.offsets)
        if not (isinstance(self.transport, TokenTransport) and isinstance(routing, SparseRouting)):
            return super().run(x, routing)
        order, load = self._by_slot(routing.offsets)
        token, weight = routing.token, routing.weight
        if order is not None:
            token, weight = token[order], weight[order]
        trip = Trip(self.network, self.local, x.device)
        return self.transport.carry_tokens(trip, as_autocast(x), token, weight, load, routing.scale)

    def merged(self, mixture: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Parameters of different ranks have no mixture: always ValueError."""
        raise ValueError(
            "experts spread over ranks cannot be merged: mixing parameters is not supported with expert "
            "parallelism; use expert=1"
        )

    def share(self, experts: Sequence[int]) -> Experts:
        """Experts of other ranks are not here: always ValueError."""
        raise ValueError("these experts are spread over ranks already; share out the bank they came from")

    def squared_gradients(self) -> Tensor:
        """The sum of squares of each expert's gradient, `[experts]` float64; 0 where another rank speaks for it.

        The rank of an expert's first slot speaks for it. Sums over experts, taken from this, do not depend on where
        experts are.
        """
        device = next((parameter.device for parameter in self.local.parameters()), None)
        total = torch.zeros(self.num_experts, dtype=torch.float64, device=device)
        rank, placement = self.network.expert.rank, self.placement
        for place, expert in enumerate(placement.experts_of(rank)):
            if placement.slots_of(expert)[0] == rank * placement.slots_per_rank + place:
                for grad in gradients_of(self.local, place):
                    total[expert] += grad.double().square().sum()
        return total

    def parameters_per_expert(self) -> int:
        return self.local.parameters_per_expert() * self.network.mesh.shape.tensor

    def dense(self, multiple: int = 1) -> FeedForward:
        return self.local.dense(multiple * self.network.mesh.shape.tensor)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, mesh=({self.network.mesh.shape.words})"

    def _by_slot(self, offsets: Tensor) -> tuple[Tensor | None, Tensor]:
        """The order that groups rows by slot (None = they are), and the load `[ranks, slots]`.

        The rows of an expert with replicas are dealt out to them in turn, beginning with another one on each rank.
        """
        placement, load = self.placement, offsets.diff()
        shape = (placement.ranks, placement.slots_per_rank)
        if placement.expert_of_slot == tuple(range(self.num_experts)):
            return None, load.view(shape)
        replicas = [list(placement.slots_of(expert)) for expert in range(self.num_experts)]
        most = max(map(len, replicas))
        table = torch.tensor([slots + slots[:1] * (most - len(slots)) for slots in replicas])
        table, count = table.to(offsets.device), torch.tensor([len(s) for s in replicas], device=offsets.device)
        expert = torch.arange(self.num_experts, device=offsets.device).repeat_interleave(load)
        turn = torch.arange(len(expert), device=offsets.device) - offsets[expert] + self.network.expert.rank
        slot = table[expert, turn % count[expert]]
        return slot.argsort(stable=True), torch.bincount(slot, minlength=len(placement.expert_of_slot)).view(shape)


def gradients_of(bank: Experts, expert: int) -> list[Tensor]:
    """The gradients of one expert, as views; of parameters that have one."""
    pieces = bank.parameters_of(expert).values()
    return [p.grad if row is None else p.grad[row] for p, row in pieces if p.grad is not None]


def parallel_banks(model: nn.Module) -> Iterator[tuple[str, ParallelExperts]]:
    """The parallel banks of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, ParallelExperts):
            yield name, module
