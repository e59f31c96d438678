"""HTTP/1.1 connections to nodes, kept for the next request.

As little as the hot path needs, over the parser of uvicorn: a general client costs as much for one
request as all that the router itself does for it (benchmarks/router_peers.py).
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import cast
from urllib.parse import SplitResult, urlsplit

import httptools

from router.upstream_socket import probe_other_end

KEEPALIVE_S = 3.0
"""A node's server (uvicorn) closes idle connections after 5 s; being first avoids sending a request
into a connection that is just being closed."""

MAX_BUFFERED_BYTES = 256 * 1024
"""Of an answer that is read too slowly, before the node is made to wait."""


class NodeConnection(asyncio.Protocol):
    """One connection: `ask`, then `read` until nothing comes, then `ask` again."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._parts: list[bytes] = []
        self._num_buffered_bytes = 0
        self._is_paused = False
        self._status: int | None = None
        self._is_complete = True
        self._failure: BaseException | None = None
        self._heard_s = self._stall_timeout_s = 0.0
        self.is_reusable = True
        """Nothing was asked yet, or the answer was read to its end and the node keeps the
        connection."""

    async def ask(self, request: bytes, *, stall_timeout_s: float) -> int:
        """Send a request and return the status of its answer.

        Raises:
            OSError: the connection is lost, or silent for `stall_timeout_s`; also by `read`.
            httptools.HttpParserError: the answer is not HTTP; also by `read`.
        """
        self._expect_answer(stall_timeout_s)
        self._transport.write(request)
        while (status := self._status) is None:
            await self._wait()
        return status

    async def read(self) -> bytes:
        """Return what has come of the answer's body since the last call, waiting for something;
        nothing at its end."""
        while not self._parts:
            if self._is_complete:
                return b""
            await self._wait()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._forget_unread()
        return data

    async def read_all(self) -> bytes:
        """Return the rest of the answer's body."""
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)

    def abort(self) -> None:
        """Close the connection at once."""
        self.is_reusable = False
        self._stop_timer()
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        self._transport = cast(asyncio.Transport, transport)
        probe_other_end(transport.get_extra_info("socket"))

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, by whomever."""
        self._fail(exc or ConnectionResetError("it has closed the connection"))

    def data_received(self, data: bytes) -> None:
        """The node has sent something."""
        if self._is_complete:
            self._fail(ConnectionAbortedError("it sends what nobody asked for"))
            self._transport.abort()
            return
        self._heard_s = self._loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(error)
            self._transport.abort()
        if self._num_buffered_bytes > MAX_BUFFERED_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def on_message_begin(self) -> None:
        """The parser has read the first byte of an answer."""
        if self._is_complete:
            raise ConnectionAbortedError("it sends a second answer")

    def on_headers_complete(self) -> None:
        """The parser has read the headers."""
        status = self._parser.get_status_code()
        # Those below announce another answer.
        self._status = status if status >= 200 else None

    def on_body(self, data: bytes) -> None:
        """The parser has read a part of the body."""
        self._parts.append(data)
        self._num_buffered_bytes += len(data)

    def on_message_complete(self) -> None:
        """The parser has read all of the answer."""
        if self._status is None:
            return
        self._is_complete = True
        # A node may answer before it has all of the request, and never read the rest.
        is_sent = self._transport.get_write_buffer_size() == 0
        self.is_reusable = is_sent and self._failure is None and self._parser.should_keep_alive()
        self._stop_timer()

    def _expect_answer(self, stall_timeout_s: float) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._forget_unread()
        self._status, self._is_complete, self.is_reusable = None, False, False
        self._heard_s, self._stall_timeout_s = self._loop.time(), stall_timeout_s
        self._timer = self._loop.call_later(stall_timeout_s, self._check_for_stall)

    def _forget_unread(self) -> None:
        self._parts.clear()
        self._num_buffered_bytes = 0
        if self._is_paused:
            self._is_paused = False
            self._heard_s = self._loop.time()
            self._transport.resume_reading()

    async def _wait(self) -> None:
        """Wait until something happens."""
        if self._failure is not None:
            raise self._failure
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, failure: BaseException) -> None:
        self.is_reusable = False
        self._failure = self._failure or failure
        self._stop_timer()
        self._wake()

    def _check_for_stall(self) -> None:
        # One timer for all of an answer: moving it with each token would cost more than the token.
        quiet_s = 0.0 if self._is_paused else self._loop.time() - self._heard_s
        if quiet_s < self._stall_timeout_s:
            rest_s = self._stall_timeout_s - quiet_s
            self._timer = self._loop.call_later(rest_s, self._check_for_stall)
        else:
            self._fail(TimeoutError(f"it is silent for {self._stall_timeout_s:g} s"))
            self._transport.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class NodeConnections:
    """Connections to any number of nodes. Belongs to one event loop."""

    def __init__(self, *, connect_timeout_s: float, keepalive_s: float = KEEPALIVE_S) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._keepalive_s = keepalive_s
        self._idle: dict[str, deque[tuple[float, NodeConnection]]] = {}
        """By address; the one that was used last is last, with the time since when it is idle."""

        self._swept_s = 0.0
        self._ssl_context: ssl.SSLContext | None = None

    async def take(self, url: str) -> NodeConnection:
        """Return a connection to the node at `url`, to be given back.

        Raises:
            OSError: there is none within the connect timeout.
        """
        idle = self._idle.get(url)
        oldest_s = asyncio.get_running_loop().time() - self._keepalive_s
        while idle:
            since_s, connection = idle.pop()
            if connection.is_reusable and since_s > oldest_s:
                return connection
            connection.abort()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                return await self._connect(urlsplit(url))
        except TimeoutError:
            raise TimeoutError(f"no connection within {self._connect_timeout_s:g} s") from None

    def give_back(self, url: str, connection: NodeConnection) -> None:
        """Keep a connection for the next request; close it if its answer was not read to the end,
        by which the node learns that nobody wants it."""
        if not connection.is_reusable:
            connection.abort()
            return
        now_s = asyncio.get_running_loop().time()
        idle = self._idle.get(url)
        if idle is None:
            idle = self._idle[url] = deque()
            if now_s - self._swept_s > self._keepalive_s:
                self._swept_s = now_s
                self._forget_unused(now_s, besides=url)
        idle.append((now_s, connection))
        self._close_old(idle, now_s)

    def close(self) -> None:
        """Close all idle connections."""
        for idle in self._idle.values():
            while idle:
                idle.pop()[1].abort()

    def _forget_unused(self, now_s: float, *, besides: str) -> None:
        """Without this, addresses of nodes that are gone would stay."""
        for url, idle in list(self._idle.items()):
            self._close_old(idle, now_s)
            if not idle and url != besides:
                del self._idle[url]

    def _close_old(self, idle: deque[tuple[float, NodeConnection]], now_s: float) -> None:
        while idle and idle[0][0] <= now_s - self._keepalive_s:
            idle.popleft()[1].abort()

    async def _connect(self, address: SplitResult) -> NodeConnection:
        is_secure = address.scheme == "https"
        assert address.hostname is not None, "the configuration was checked"
        # Not over a socket that was connected before: uvloop, which has just stopped watching that
        # one, sometimes never hears of it again.
        _, connection = await asyncio.get_running_loop().create_connection(
            NodeConnection,
            address.hostname,
            address.port or (443 if is_secure else 80),
            ssl=self._secure() if is_secure else None,
        )
        return connection

    def _secure(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            self._ssl_context = ssl.create_default_context()
        return self._ssl_context
