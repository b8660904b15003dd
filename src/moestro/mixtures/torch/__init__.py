"""The mixtures that need gradients, and the way from a fitted mixture to a layer and back. Needs torch."""

from moestro.mixtures.torch.layer import to_moe
from moestro.mixtures.torch.read import from_moe

__all__ = ["from_moe", "to_moe"]
