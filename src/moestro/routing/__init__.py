"""The waist: what routers decide and experts carry out. Values and their algebra; imports torch only."""

from moestro.routing.context import Context
from moestro.routing.decision import Decision, Routing
from moestro.routing.merge import MergeRouting
from moestro.routing.selection import Selection, top_k
from moestro.routing.soft import SoftRouting
from moestro.routing.sparse import SparseRouting

__all__ = [
    "Context",
    "Decision",
    "MergeRouting",
    "Routing",
    "Selection",
    "SoftRouting",
    "SparseRouting",
    "top_k",
]
