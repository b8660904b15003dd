"""The bridge to transformers: `import moestro.hf` registers our experts back end."""

from moestro.hf.experts import BACKEND, experts_forward, register_backend, use_experts
from moestro.hf.families import FoundLayer, all_families, find_layers

register_backend()

__all__ = [
    "BACKEND",
    "FoundLayer",
    "all_families",
    "experts_forward",
    "find_layers",
    "register_backend",
    "use_experts",
]
