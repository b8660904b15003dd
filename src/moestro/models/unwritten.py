"""Building a model whose weights are about to be replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def unwritten_parameters() -> Iterator[None]:
    """While this holds, new parameters keep the memory as it came: nothing is drawn, and no page is touched.

    Memory that is never written takes no room, so that a model whose large parameters are replaced by small codes
    never needs the room of the large ones. Buffers are computed as always.
    """
    with _Unwritten():
        yield


class _Unwritten(TorchFunctionMode):
    """Leaves out every function that writes into a parameter: by torch's convention its name ends in `_`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        target = args[0] if args else kwargs.get("tensor")  # nn.init passes everything by name
        if name.endswith("_") and not name.endswith("__") and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)
