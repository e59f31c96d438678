"""Sockets to nodes, on which a node that is cut off is noticed without waiting for its answer."""

from __future__ import annotations

import socket

KEEPALIVE_IDLE_S = 1
KEEPALIVE_INTERVAL_S = 1
KEEPALIVE_PROBES = 3
USER_TIMEOUT_MS = 2000
"""Nothing was acknowledged for this long: the connection is dead."""


def probe_other_end(connected: socket.socket) -> None:
    """Make a connection to a node notice that the node is gone, and send what it has at once.

    A peer that is switched off, or behind a cut cable, sends no end of the connection; Linux by
    itself notices after many minutes. Here it is probed after a second of silence, and given up
    two seconds after it was last heard, however long the node may think before its first token.
    The user timeout overrules the number of probes; alone they would take four seconds.
    """
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
        (socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
        (socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
        (socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS),
        (socket.TCP_NODELAY, 1),
    ):
        connected.setsockopt(socket.IPPROTO_TCP, option, value)
