"""Ways to bring rows to their experts and back; importing this registers all of them."""

from moestro.parallel.transports.base import TokenTransport, Transport, all_transports, make_transport, transport
from moestro.parallel.transports.linear import Linear

__all__ = ["Linear", "TokenTransport", "Transport", "all_transports", "make_transport", "transport"]
