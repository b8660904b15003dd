"""moestro: every Mixture-of-Experts method as a composition of a few swappable parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestro.balance import RoutingLog
    from moestro.hf import replay, watch
    from moestro.layers import MoE
    from moestro.methods import all_methods, build, method
    from moestro.models import DecoderLM, build_language_model, load_model, save_model
    from moestro.routing import Context, Decision, MergeRouting, Selection, SoftRouting, SparseRouting

__version__ = "0.1.0"

_HOMES = {
    "RoutingLog": "balance",
    "replay": "hf",
    "watch": "hf",
    "MoE": "layers",
    "all_methods": "methods",
    "build": "methods",
    "method": "methods",
    "DecoderLM": "models",
    "build_language_model": "models",
    "load_model": "models",
    "save_model": "models",
    "Context": "routing",
    "Decision": "routing",
    "MergeRouting": "routing",
    "Selection": "routing",
    "SoftRouting": "routing",
    "SparseRouting": "routing",
}

__all__ = [
    "Context",
    "Decision",
    "DecoderLM",
    "MergeRouting",
    "MoE",
    "RoutingLog",
    "Selection",
    "SoftRouting",
    "SparseRouting",
    "__version__",
    "all_methods",
    "build",
    "build_language_model",
    "load_model",
    "method",
    "replay",
    "save_model",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `moestro --help` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moestro' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"moestro.{_HOMES[name]}"), name)
