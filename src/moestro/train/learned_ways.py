"""What transports have learned of their speed, which a resumed run needs to compute as before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moestro.experts.parallel import parallel_banks
from moestro.parallel import Mesh, Transport
from moestro.train.team import Team

GROUP = "transport."  # of its tensors in a checkpoint


def ways_kept(model: nn.Module, mesh: Mesh | None, team: Team) -> dict[str, Tensor]:
    """What a checkpoint keeps of them, by name: one of each for all ranks among which rows travel.

    Every process calls it, as what other `data` ranks learned is asked of them.
    """
    states = _states(model)
    if mesh is None or not states:
        return {}
    mine = {name: tensor.tolist() for name, tensor in states.items()}
    kept: dict[str, Tensor] = {}
    for data, said in team.gather([mesh.experts.get_local_rank("data"), mine]):
        for name, tensor in states.items():
            value = torch.tensor(said[name], dtype=tensor.dtype).view(-1, *tensor.shape[1:])
            kept.setdefault(f"{GROUP}{data}.{name}", value)
    return kept


def take_ways(model: nn.Module, mesh: Mesh | None, tensors: Mapping[str, Tensor]) -> None:
    """Let the transports of a model go on with what a checkpoint kept of theirs."""
    if mesh is None:
        return
    own = f"{GROUP}{mesh.experts.get_local_rank('data')}."
    for place, transport in enumerate(_transports(model)):
        mine = f"{own}{place}."
        transport.take({name.removeprefix(mine): tensors[name] for name in tensors if name.startswith(mine)})


def _states(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{place}.{name}": tensor
        for place, transport in enumerate(_transports(model))
        for name, tensor in transport.state().items()
    }


def _transports(model: nn.Module) -> list[Transport]:
    """Those of a model, each once, in the order of its layers."""
    return list({id(bank.transport): bank.transport for _, bank in parallel_banks(model)}.values())
