"""What a pipelined exchange keeps of each part until the backward pass, and how the rest comes back."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Store = Callable[[Tensor], Callable[[], Tensor]]
"""Takes a tensor, and returns what gives it back."""


def keep(tensor: Tensor) -> Callable[[], Tensor]:
    """A store that leaves tensors where they are."""
    return lambda: tensor


def host(tensor: Tensor) -> Callable[[], Tensor]:
    """A store in the memory of the host, for tensors of a device.

    Raises:
        ValueError: a tensor that is there already.
    """
    if tensor.device.type == "cpu":
        raise ValueError(
            "this tensor is in the memory of the host already; offload it with Files(folder), or keep it"
        )
    copy, device = torch.empty_like(tensor, device="cpu", pin_memory=True), tensor.device
    copy.copy_(tensor, non_blocking=True)
    return lambda: copy.to(device, non_blocking=True)


class Files:
    """A store in files, that have no names and end with the process, however it ends.

    Args:
        folder: on a disk; many systems have their folder of temporary files in memory.

    Raises:
        OSError: when a tensor is stored and the disk is full.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __call__(self, tensor: Tensor) -> Callable[[], Tensor]:
        number = tensor.numel()
        if not number:
            return keep(tensor)
        handle, name = tempfile.mkstemp(dir=self.folder)
        try:
            os.posix_fallocate(handle, 0, number * tensor.element_size())
            stored = torch.from_file(name, shared=True, size=number, dtype=tensor.dtype)
        finally:
            os.close(handle)
            os.unlink(name)
        stored, device = stored.view(tensor.shape).copy_(tensor), tensor.device
        return lambda: stored.to(device)


@dataclass(frozen=True)
class Restore:
    """Where a part's tensors are between its forward and its backward pass (Zhang et al. 2023, MPipeMoE).

    Args:
        rows: store of the rows that came from other ranks; None = they are sent again in the backward pass.
        middle: store of what the experts keep for their gradients; None = they compute again.
    """

    rows: Store | None = keep
    middle: Store | None = keep


def strategies(store: Store) -> dict[str, Restore]:
    """The paper's strategies by their names, with what is offloaded in this store."""
    return {
        "none": Restore(),
        "S1": Restore(store, store),
        "S2": Restore(None, store),
        "S3": Restore(store, None),
        "S4": Restore(None, None),
    }


class Remembered:
    """What is left of one part that experts have computed.

    Args:
        restore: what to keep.
        arrived: the part's rows.
        by_slot: brings rows into the order in which the experts take them.
        run: `(rows, told) -> rows`, through the experts; `told` is called with the rows that they take.
        learned: parameters of the experts.
    """

    def __init__(
        self,
        restore: Restore,
        arrived: Tensor,
        by_slot: Callable[[Tensor], Tensor],
        run: Callable[[Tensor, Callable[[Tensor], None]], Tensor],
        learned: Sequence[Tensor],
    ) -> None:
        self._restore, self._by_slot, self._run, self._learned = restore, by_slot, run, learned
        self._autocast = _same_autocast(arrived.device.type)
        self._rows: Callable[[], Tensor] | None = None
        self._edges: tuple[GradientEdge, GradientEdge] | None = None
        self._again: Tensor | None = None
        if restore.middle is None:
            if restore.rows is not None:
                self._rows = restore.rows(arrived)
            with torch.no_grad():
                self._out: Tensor | None = run(arrived, _nothing)
        else:
            self._out = self._with_graph(arrived)

    def take(self) -> Tensor:
        """The results, without a graph; once."""
        out, self._out = self._out, None
        assert out is not None
        return out

    def gradients(self, grad: Tensor, arrived: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
        """Of the rows and of the parameters; `arrived` are the rows, if they were sent again."""
        if self._restore.middle is None:
            leaf = (self._rows() if self._rows is not None else arrived).detach().requires_grad_()  # type: ignore[union-attr]
            with torch.enable_grad(), self._autocast():
                out = self._run(leaf, _nothing)
            return self._of(out if out.requires_grad else None, leaf, grad)
        self._again = None if arrived is None else self._by_slot(arrived)
        enter, leave = self._edges or (None, None)
        found = self._of(leave, enter, grad)
        self._edges = self._again = None
        return found

    def _of(self, out: Any, rows: Any, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        if out is None:
            return None, [None] * len(self._learned)
        own, *others = torch.autograd.grad(out, [rows, *self._learned], grad, allow_unused=True)
        return own, list(others)

    def _with_graph(self, arrived: Tensor) -> Tensor:
        """Run the experts; what their graph saves goes to the stores."""
        restore, start = self._restore, torch.zeros((), device=arrived.device, requires_grad=True)
        assert restore.middle is not None
        pack = Pack(self._learned, restore.rows or self._later, restore.middle)
        everything = restore.rows is keep and restore.middle is keep
        stores = nullcontext() if everything else saved_tensors_hooks(pack, lambda stored: stored())
        with torch.enable_grad(), stores:
            entered = _Enter.apply(arrived, start)
            out = self._run(entered, pack.told)
        if out.requires_grad:
            self._edges = get_gradient_edge(entered), get_gradient_edge(out)
        return out.detach()

    def _later(self, rows: Tensor) -> Callable[[], Tensor]:
        """A store for rows that will be sent again."""
        return lambda: self._rows_again()

    def _rows_again(self) -> Tensor:
        assert self._again is not None
        return self._again.flatten()


class Pack:
    """Brings what a graph saves to its store, every piece of memory once, whatever the views of it.

    Args:
        learned: parameters, which stay.
        rows: store of the rows that the experts take.
        middle: store of everything else.
    """

    def __init__(self, learned: Sequence[Tensor], rows: Store, middle: Store) -> None:
        # a weak reference keeps the name of a storage from being given to another one
        self._stay = {ref.cdata: ref for ref in map(_storage, learned)}
        self._rows, self._middle, self._of_rows = rows, middle, dict[int, StorageWeakRef]()
        self._stored: dict[int, tuple[StorageWeakRef, int, Callable[[], Tensor]]] = {}

    def told(self, rows: Tensor) -> None:
        ref = _storage(rows)
        self._of_rows[ref.cdata] = ref

    def __call__(self, tensor: Tensor) -> Callable[[], Tensor]:
        tensor, ref = tensor.detach(), _storage(tensor)
        if ref.cdata in self._stay or not tensor.is_floating_point() or not tensor.numel():
            return keep(tensor)
        _, version, stored = self._stored.get(ref.cdata, (ref, -1, keep(tensor)))
        if version != tensor._version:
            storage = tensor.untyped_storage()
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
            stored = (self._rows if ref.cdata in self._of_rows else self._middle)(flat)
            self._stored[ref.cdata] = ref, tensor._version, stored
        shape = tensor.shape, tensor.stride(), tensor.storage_offset()
        return lambda: stored().as_strided(*shape)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


class _Enter(torch.autograd.Function):
    """The beginning of a graph, which does not hold its rows as a leaf would."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, start: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None


def with_memory(value: Any) -> Tensor:
    """A tensor for autograd to save, with which a value lives and goes.

    The value is held by the tensor's storage, and so by whatever autograd's hooks keep of it: under activation
    checkpointing nothing after the forward pass, and that of the second run from then on.
    """
    memory = torch.empty(1)
    memory.untyped_storage().value = value  # type: ignore[attr-defined]
    return memory


def taken_from(memory: Tensor) -> Any:
    """The value that lives with a tensor, once; None the second time."""
    storage: Any = memory.untyped_storage()
    value, storage.value = getattr(storage, "value", None), None
    return value


def _nothing(rows: Tensor) -> None:
    pass


def _same_autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


def added(total: Iterable[Tensor | None], more: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Gradients added up, of which some may be missing."""
    return [
        other if each is None else each if other is None else each + other
        for each, other in zip(total, more, strict=True)
    ]
