"""How the processes of a run are arranged: which hold which part of the model, and which see the same tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moestro.parallel.groups import rank_groups


@dataclass(frozen=True)
class MeshShape:
    """The sizes of a mesh. One world is factored twice, for experts and for everything else.

        ranks = data * expert * tensor          of experts; the last varies fastest
        ranks = dense * copies                  of tokens; likewise

    The two factorings are free of each other ("MoE parallel folding", Liu et al. 2025): experts may be spread over
    ranks that attention uses for tensor or for data parallelism.

    Args:
        data: how often each expert is held, by ranks that see different tokens.
        expert: ranks over which the experts of a layer are spread.
        tensor: ranks over which each expert is sliced along its hidden size.
        copies: ranks that hold the same tokens, as the dense part split over them (tensor parallelism) has it.

    Raises:
        ValueError: a size below 1, or copies that do not divide the ranks.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1
    copies: int = 1

    def __post_init__(self) -> None:
        if min(self.data, self.expert, self.tensor, self.copies) < 1:
            raise ValueError(f"every size of a mesh must be at least 1, got {self}")
        if self.ranks % self.copies:
            raise ValueError(f"copies={self.copies} does not divide the {self.ranks} ranks of {self.words}")

    @classmethod
    def fitting(cls, ranks: int, *, expert: int = 1, tensor: int = 1, copies: int = 1) -> MeshShape:
        """The mesh of all ranks with experts spread and sliced as said; data parallelism takes the rest.

        Raises:
            ValueError: a number of ranks that no such mesh has; the message names those that one has.
        """
        block = expert * tensor
        if min(ranks, block) < 1 or ranks % block:
            fits = ", ".join(str(block * n) for n in range(1, 5)) if block > 0 else "no number of"
            raise ValueError(
                f"{ranks} processes fit no mesh with expert={expert} and tensor={tensor}; start {fits}, ... "
                "processes, or choose sizes whose product divides their number"
            )
        return cls(ranks // block, expert, tensor, copies)

    @property
    def ranks(self) -> int:
        """Processes of the mesh."""
        return self.data * self.expert * self.tensor

    @property
    def dense(self) -> int:
        """Ranks that see different tokens."""
        return self.ranks // self.copies

    @property
    def words(self) -> str:
        """The sizes, for messages."""
        return f"data={self.data} x expert={self.expert} x tensor={self.tensor}"


class Mesh:
    """The process groups of this rank.

    Every process makes its mesh at the same place of the program, after torch.distributed has begun.

    Args:
        shape: sizes.
        device_type: `cpu` or `cuda`.
        ranks_per_node: ranks of one machine, which come one after another; None = as torchrun says, else all. On
            one machine a smaller number emulates nodes: transports then count and route as if between machines.

    Raises:
        ValueError: torch.distributed that does not run, or another number of processes than the mesh has.

    Attributes:
        experts: DeviceMesh with the dimensions `data`, `expert` and `tensor`.
        tokens: DeviceMesh with the dimensions `dense` and `copies`.
        node: ranks of `expert` on this rank's node; None if nodes share the group unevenly.
        across: ranks of `expert` at this rank's place of every node; None likewise.
    """

    def __init__(self, shape: MeshShape, device_type: str = "cpu", ranks_per_node: int | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("a mesh needs processes; call torch.distributed.init_process_group first")
        if dist.get_world_size() != shape.ranks:
            raise ValueError(
                f"{dist.get_world_size()} processes do not fill a mesh of {shape.words}; start {shape.ranks}, "
                f"or choose sizes whose product is {dist.get_world_size()}"
            )
        self.shape, self.rank = shape, dist.get_rank()
        self.ranks_per_node = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", shape.ranks))
        sizes = (shape.data, shape.expert, shape.tensor)
        self.experts: DeviceMesh = init_device_mesh(device_type, sizes, mesh_dim_names=("data", "expert", "tensor"))
        self.tokens: DeviceMesh = init_device_mesh(
            device_type, (shape.dense, shape.copies), mesh_dim_names=("dense", "copies")
        )
        self.node, self.across = self._node_groups()

    @cached_property
    def expert(self) -> dist.ProcessGroup:
        """Ranks over which the experts of a layer are spread."""
        return self.experts.get_group("expert")

    @cached_property
    def replicas(self) -> dist.ProcessGroup:
        """Ranks that hold the same experts (and the same slice of them)."""
        return self.experts.get_group("data")

    @cached_property
    def tensor(self) -> dist.ProcessGroup:
        """Ranks that hold slices of the same experts."""
        return self.experts.get_group("tensor")

    @cached_property
    def dense(self) -> dist.ProcessGroup:
        """Ranks that see different tokens: all that differ in their data."""
        return self.tokens.get_group("dense")

    @cached_property
    def copies(self) -> dist.ProcessGroup:
        """Ranks that see the same tokens."""
        return self.tokens.get_group("copies")

    def node_of(self, rank: int) -> int:
        """The node of a rank of the world."""
        return rank // self.ranks_per_node

    def _node_groups(self) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """Each group of experts by node, and by place on the node; every rank takes part in making all groups."""
        shape, inside, between = self.shape, list[list[int]](), list[list[int]]()
        sizes = {"tensor": shape.tensor, "expert": shape.expert, "data": shape.data}
        for group in rank_groups(sizes, ["expert"]):
            nodes: dict[int, list[int]] = {}
            for rank in group:
                nodes.setdefault(self.node_of(rank), []).append(rank)
            if len({len(ranks) for ranks in nodes.values()}) != 1:
                return None, None  # the same on every rank: all look at all groups
            inside += nodes.values()
            between += map(list, zip(*nodes.values(), strict=True))
        return dist.new_subgroups_by_enumeration(inside)[0], dist.new_subgroups_by_enumeration(between)[0]
