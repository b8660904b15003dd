"""The dense part of a spread model, sharded over the ranks that see different tokens."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moestro.experts.parallel import parallel_banks
from moestro.parallel import Mesh


def shard_dense(model: nn.Module, mesh: Mesh, units: Iterable[nn.Module] = ()) -> None:
    """Let each rank keep a share of everything but the experts, in place (PyTorch's FSDP2; ZeRO stage 3).

    Weights are put together for the time that a unit computes; gradients and the optimiser's state exist in shares
    only. A share is a run of rows of every parameter; single numbers stay on every rank. After
    `moestro.layers.spread`, which leaves experts with their ranks; before the optimiser is made.

    Args:
        model: spread over the mesh.
        mesh: its ranks; the shares are of `mesh.dense`.
        units: modules that are put together one after another, such as the blocks of a decoder; what is in none
            of them stays together while the model runs; none = the whole model at once.

    Raises:
        ValueError: a mesh whose dense part is held in copies, or a model that is sharded already.
    """
    if mesh.shape.copies > 1:
        raise ValueError(
            f"copies={mesh.shape.copies}: ranks that hold the same tokens split the dense part themselves; "
            "shard it on a mesh with copies=1"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("this model is sharded already; shard a model once")
    stay = {parameter for _, bank in parallel_banks(model) for parameter in bank.parameters()}
    stay |= {parameter for parameter in model.parameters() if not parameter.ndim}  # no rows to share out
    for module in (*units, model):
        # also the outermost is taken apart again after it ran, so that what is here is always the shares
        fully_shard(module, mesh=mesh.tokens["dense"], ignored_params=stay, reshard_after_forward=True)


def sharded_groups(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that are sharded and those that are not, apart: fused and foreach optimisers cannot mix them."""
    kinds: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return list(kinds.values())
