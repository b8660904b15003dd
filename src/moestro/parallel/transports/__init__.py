"""Ways to bring rows to their experts and back; importing this registers all of them."""

from moestro.parallel.transports.adaptive import Adaptive
from moestro.parallel.transports.base import TokenTransport, Transport, all_transports, make_transport, transport
from moestro.parallel.transports.capacity import StaticCapacity
from moestro.parallel.transports.copies import DropCopies
from moestro.parallel.transports.data_centric import DataCentric
from moestro.parallel.transports.granular import Granular
from moestro.parallel.transports.linear import Linear
from moestro.parallel.transports.measured import Choice, Measured
from moestro.parallel.transports.pipelined import Chunked, Pairwise, Pipelined
from moestro.parallel.transports.shadow import Shadow
from moestro.parallel.transports.tokens import Deduplicated, Gather
from moestro.parallel.transports.two_level import Leader, TwoLevel

__all__ = [
    "Adaptive",
    "Choice",
    "Chunked",
    "DataCentric",
    "Deduplicated",
    "DropCopies",
    "Gather",
    "Granular",
    "Leader",
    "Linear",
    "Measured",
    "Pairwise",
    "Pipelined",
    "Shadow",
    "StaticCapacity",
    "TokenTransport",
    "Transport",
    "TwoLevel",
    "all_transports",
    "make_transport",
    "transport",
]
