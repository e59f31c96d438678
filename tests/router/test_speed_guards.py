"""What keeps the router fast, and is lost without anybody noticing. No clocks."""

from __future__ import annotations

import socket
import struct

from starlette.middleware.base import BaseHTTPMiddleware

from orchestrator.wire import TokenEvent
from router.access import AccessLog
from router.node_client import NodeClient
from tests.router.conftest import RunningRouter
from tests.router.fake_node import FakeNode, Stall
from tests.router.servers import http_post
from tests.router.test_upstream_socket import sockets_to

COMPLETION = {"model": "tiny", "stream": True, "prompt": "Hi"}
_DATA_SEGS_IN = slice(152, 156)
"""Of linux/tcp.h's struct tcp_info: segments with data that a socket has received."""


def num_segments(connection: socket.socket) -> int:
    """Return how many segments with data have come."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    (found,) = struct.unpack("=I", info[_DATA_SEGS_IN])
    return int(found)


def test_headers_and_first_token_come_in_one_segment(router: RunningRouter, node: FakeNode) -> None:
    """Two would be held apart by Nagle's algorithm and a delayed acknowledgement, 40 ms.

    The node stalls behind its first token, so nothing else is on its way.
    """
    node.script = lambda _: [TokenEvent((65,)), Stall()]
    with router.connect() as connection:
        connection.sendall(http_post("/v1/completions", COMPLETION))

        first = connection.recv(65536)

        assert b'data: {"id":"cmpl-' in first
        assert num_segments(connection) == 1


def test_connections_of_clients_send_at_once(router: RunningRouter) -> None:
    """Without TCP_NODELAY a token waits until the one before it is acknowledged."""
    with router.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: test\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")

        (accepted,) = sockets_to(connection.getsockname()[1])

        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


async def test_connections_to_nodes_send_at_once(node: FakeNode) -> None:
    client = NodeClient(connect_timeout_s=1.0, stall_timeout_s=5.0)
    await client.describe(node.url, timeout_s=5.0)

    (connection,) = sockets_to(int(node.url.rpartition(":")[2]))

    with connection:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    client.close()


def test_no_middleware_is_made_with_starlettes_base_class(quiet_router: RunningRouter) -> None:
    """One doubles the processor time of a stream."""
    quiet_router.http.get("/health").raise_for_status()
    stack = []
    layer = quiet_router.app.middleware_stack
    while layer is not None:
        stack.append(layer)
        layer = getattr(layer, "app", None)

    assert any(isinstance(layer, AccessLog) for layer in stack)
    assert not any(isinstance(layer, BaseHTTPMiddleware) for layer in stack)


def test_headers_without_a_body_are_not_kept_back(quiet_router: RunningRouter) -> None:
    """There is no first piece of the body for them to wait for."""
    with quiet_router.connect() as connection:
        connection.sendall(b"HEAD /health HTTP/1.1\r\nhost: test\r\n\r\n")

        assert connection.recv(65536).startswith(b"HTTP/1.1 ")
