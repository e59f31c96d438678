"""Connections to nodes: kept, never mixed up, and never read faster than their answers are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import httptools
import pytest
import uvloop

from router.node_connection import MAX_BUFFERED_BYTES, NodeConnection, NodeConnections

REQUEST = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n"
STALL_TIMEOUT_S = 5.0


def answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class Server:
    """Answers each request on a connection with what `respond` returns, given its number."""

    def __init__(self, respond: Callable[[int], bytes]) -> None:
        self._respond = respond
        self.num_connections = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        for writer in self.writers:
            writer.close()
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.writers.append(writer)
        number = 0
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(self._respond(number))
                number += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def wait_until_left(self) -> None:
        """Wait until nobody is connected."""
        for writer in self.writers:
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def ask(connections: NodeConnections, url: str) -> tuple[int, bytes]:
    connection = await connections.take(url)
    try:
        status = await connection.ask(REQUEST, stall_timeout_s=STALL_TIMEOUT_S)
        return status, await connection.read_all()
    finally:
        connections.give_back(url, connection)


@pytest.fixture
def connections() -> NodeConnections:
    return NodeConnections(connect_timeout_s=STALL_TIMEOUT_S)


async def test_a_connection_is_used_again(connections: NodeConnections) -> None:
    async with Server(lambda number: answer(b"%d" % number)) as server:
        found = [await ask(connections, server.url) for _ in range(3)]
        connections.close()

    assert found == [(200, b"0"), (200, b"1"), (200, b"2")]
    assert server.num_connections == 1


def test_connections_that_are_made_at_once_all_work() -> None:
    """Under uvloop, with which the router runs: handed connected sockets, it lost some of them."""

    async def ask_all() -> list[tuple[int, bytes]]:
        connections = NodeConnections(connect_timeout_s=STALL_TIMEOUT_S)
        async with Server(lambda _: answer(b"a")) as server:
            found = await asyncio.gather(*(ask(connections, server.url) for _ in range(100)))
            connections.close()
        return found

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(ask_all()) == [(200, b"a")] * 100


async def test_what_was_not_read_is_not_taken_for_the_next_answer(
    connections: NodeConnections,
) -> None:
    """The first answer is all there, and its reader has left."""
    async with Server(lambda number: answer(b"%d" % number)) as server:
        connection = await connections.take(server.url)
        await connection.ask(REQUEST, stall_timeout_s=STALL_TIMEOUT_S)
        assert connection.is_reusable
        connections.give_back(server.url, connection)

        assert await ask(connections, server.url) == (200, b"1")
        connections.close()


async def test_an_answer_that_is_left_closes_its_connection(connections: NodeConnections) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n"
    async with Server(lambda _: head) as server:
        connection = await connections.take(server.url)
        await connection.ask(REQUEST, stall_timeout_s=STALL_TIMEOUT_S)
        assert await connection.read() == b"a"
        connections.give_back(server.url, connection)

        other = await connections.take(server.url)

        assert other is not connection
        other.abort()


async def test_an_answer_that_is_not_http_fails(connections: NodeConnections) -> None:
    async with Server(lambda _: b"SMTP ready\r\n") as server:
        with pytest.raises(httptools.HttpParserError):
            await ask(connections, server.url)


@pytest.mark.parametrize("surplus", [b"bc", answer(b"b"), answer(b"b")[:5]])
async def test_a_connection_that_says_too_much_is_not_kept(
    connections: NodeConnections, surplus: bytes
) -> None:
    async with Server(lambda _: answer(b"a") + surplus) as server:
        for _ in range(2):
            assert await ask(connections, server.url) == (200, b"a")

    assert server.num_connections == 2


async def test_an_answer_that_is_announced_is_waited_for(connections: NodeConnections) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    async with Server(lambda _: hints + answer(b"a")) as server:
        for _ in range(2):
            assert await ask(connections, server.url) == (200, b"a")
        connections.close()

    assert server.num_connections == 1


async def test_silence_ends_an_answer(connections: NodeConnections) -> None:
    async with Server(lambda _: b"") as server:
        connection = await connections.take(server.url)

        with pytest.raises(TimeoutError, match=r"silent for 0\.01 s"):
            await connection.ask(REQUEST, stall_timeout_s=0.01)
        connection.abort()


async def test_a_node_is_not_read_faster_than_its_answer() -> None:
    """The transport is asked to pause above the limit, and to go on once what came was taken."""
    transport = RecordingTransport()
    connection = NodeConnection()
    connection._transport = transport  # type: ignore[assignment] # noqa: SLF001 - no socket to tune
    size = 4 * MAX_BUFFERED_BYTES
    asking = asyncio.create_task(connection.ask(REQUEST, stall_timeout_s=STALL_TIMEOUT_S))
    await asyncio.sleep(0)
    connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
    await asking

    connection.data_received(bytes(MAX_BUFFERED_BYTES + 1))
    connection.data_received(b"x")
    taken = await connection.read()

    assert len(taken) == MAX_BUFFERED_BYTES + 2
    assert transport.calls == ["write", "pause_reading", "resume_reading"]
    connection.abort()


class RecordingTransport:
    """Notes what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def write(self, data: bytes) -> None:
        self.calls.append("write")

    def pause_reading(self) -> None:
        self.calls.append("pause_reading")

    def resume_reading(self) -> None:
        self.calls.append("resume_reading")

    def abort(self) -> None:
        self.calls.append("abort")


async def test_a_connection_on_which_a_request_is_stuck_is_not_used_again(
    connections: NodeConnections,
) -> None:
    """The node refuses by the head alone; the body is more than the kernel takes in."""
    request = b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 20000000\r\n\r\n" + bytes(
        20_000_000
    )

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(b"too much"))
        await is_over.wait()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    is_over = asyncio.Event()
    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        connection = await connections.take(url)
        await connection.ask(request, stall_timeout_s=STALL_TIMEOUT_S)
        body = await connection.read_all()

        assert (body, connection.is_reusable) == (b"too much", False)
        connections.give_back(url, connection)
        is_over.set()
        server.close()
        await server.wait_closed()


async def test_connections_to_a_node_that_is_gone_are_closed_while_others_are_used() -> None:
    connections = NodeConnections(connect_timeout_s=STALL_TIMEOUT_S, keepalive_s=0.01)
    async with Server(lambda _: answer(b"")) as gone, contextlib.AsyncExitStack() as others:
        await ask(connections, gone.url)
        leaving = asyncio.create_task(gone.wait_until_left())
        while not leaving.done():
            server = await others.enter_async_context(Server(lambda _: answer(b"")))
            await ask(connections, server.url)
        connections.close()
