"""Many processes as one: meshes of ranks, placements of experts, and transports that bring rows to them."""

from moestro.parallel.costs import LayerCost
from moestro.parallel.eplb import eplb
from moestro.parallel.gains import Gain, policy_gains
from moestro.parallel.groups import rank_groups
from moestro.parallel.mesh import Mesh, MeshShape
from moestro.parallel.network import Network, Trip
from moestro.parallel.placement import Placement
from moestro.parallel.policies import POLICIES, Cluster
from moestro.parallel.predict import PREDICTORS
from moestro.parallel.traffic import Traffic
from moestro.parallel.transports import TokenTransport, Transport, all_transports, make_transport, transport

__all__ = [
    "POLICIES",
    "PREDICTORS",
    "Cluster",
    "Gain",
    "LayerCost",
    "Mesh",
    "MeshShape",
    "Network",
    "Placement",
    "TokenTransport",
    "Traffic",
    "Transport",
    "Trip",
    "all_transports",
    "eplb",
    "make_transport",
    "policy_gains",
    "rank_groups",
    "transport",
]
