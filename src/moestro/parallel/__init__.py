"""Many processes as one: meshes of ranks, placements of experts, and transports that bring rows to them."""

from moestro.parallel.placement import Placement

__all__ = ["Placement"]
