"""HTTP calls to a node. Whatever goes wrong comes out as one of our errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import TypeVar

import httptools
import msgspec

from orchestrator.core.errors import NodeUnavailable, RequestRejected
from orchestrator.tracing import TRACEPARENT, Span
from orchestrator.wire import (
    ErrorBody,
    GenerateRequest,
    NodeDescription,
    NodeSnapshot,
    TokenEvent,
)
from router.node_connection import NodeConnection, NodeConnections

Answer = TypeVar("Answer")

MAX_LINE_BYTES = 1024 * 1024

HEARTBEATS_PER_STALL = 5
"""Signs of life that a node gets the time to send before its silence ends a sequence: a few may
be late on a busy machine."""

_encoder = msgspec.json.Encoder()
_event_decoder = msgspec.json.Decoder(TokenEvent)
_snapshot_decoder = msgspec.json.Decoder(NodeSnapshot)
_error_decoder = msgspec.json.Decoder(ErrorBody)


class NodeClient:
    """Talks to any number of nodes over kept connections. Belongs to one event loop."""

    def __init__(self, *, connect_timeout_s: float, stall_timeout_s: float) -> None:
        """A node that is silent on a sequence for `stall_timeout_s` has lost it; it is asked for
        signs of life that come several times as often."""
        self._heartbeat_s = stall_timeout_s / HEARTBEATS_PER_STALL
        self._stall_timeout_s = stall_timeout_s
        self._connections = NodeConnections(connect_timeout_s=connect_timeout_s)

    def close(self) -> None:
        """Close all connections. No call follows."""
        self._connections.close()

    async def describe(self, url: str, *, timeout_s: float) -> NodeDescription:
        """Return what the node at `url` serves.

        Raises:
            NodeUnavailable: there is no usable answer within `timeout_s`.
        """
        return await self._get(url, "/v1/node", NodeDescription, timeout_s)

    async def snapshot(self, url: str, *, timeout_s: float) -> NodeSnapshot:
        """Return the load of the node at `url`.

        Raises:
            NodeUnavailable: there is no usable answer within `timeout_s`.
        """
        return await self._get(url, "/v1/snapshot", NodeSnapshot, timeout_s)

    async def snapshots(self, url: str, *, timeout_s: float) -> AsyncGenerator[NodeSnapshot]:
        """Yield the load of the node at `url` whenever it changes, until the node ends it.

        Raises:
            NodeUnavailable: the node has no such stream, or is silent for `timeout_s`.
        """
        with _NodeUnavailableIfFailed(url):
            request, lines = _get(url, "/v1/snapshots"), _Lines()
            connection = await self._ask(url, request, timeout_s, _unavailable)
            try:
                while data := await connection.read():
                    for snapshot in _snapshot_decoder.decode_lines(lines.ended_by(data) or b""):
                        yield snapshot
            finally:
                self._connections.give_back(url, connection)

    async def generate(
        self, url: str, request: GenerateRequest, *, span: Span | None = None
    ) -> AsyncGenerator[Sequence[TokenEvent]]:
        """Yield the events of one sequence up to the one with a `finish_reason`.

        The node's spans go on from `span`.

        An empty batch is a sign of life: the node has the request and no news.
        Events come as soon as they are here; those that are here together come together, so
        that a router that has fallen behind catches up with fewer writes.
        Closing the generator early closes the connection, which aborts the request on the node.

        Raises:
            NodeUnavailable: the node cannot be reached, refuses for its own reasons, falls
                silent, or ends without a finish reason.
            RequestRejected: the node finds the request invalid.
        """
        request = msgspec.structs.replace(request, heartbeat_s=self._heartbeat_s)
        traceparent = None if span is None else span.traceparent
        message = _post(url, "/v1/generate", _encoder.encode(request), traceparent=traceparent)
        lines, is_finished = _Lines(), False
        try:
            with _NodeUnavailableIfFailed(url):
                connection = await self._ask(url, message, self._stall_timeout_s, _refusal)
                try:
                    while data := await connection.read():
                        ended = lines.ended_by(data)
                        if ended is None:
                            continue
                        events, foreign = _events(ended)
                        is_finished = is_finished or _has_last(events)
                        if events or foreign is None:
                            yield events
                        if foreign is not None:
                            raise foreign
                        # Read on to the end of the answer, so that the connection can be kept.
                    lines.check_end()
                finally:
                    self._connections.give_back(url, connection)
        except NodeUnavailable:
            # Once everything was said, it does not matter how the connection ends.
            if not is_finished:
                raise
        else:
            if not is_finished:
                raise NodeUnavailable(f"node {url} ended its answer before the request's end")

    async def _get(
        self, url: str, path: str, answer_type: type[Answer], timeout_s: float
    ) -> Answer:
        with _NodeUnavailableIfFailed(url):
            async with asyncio.timeout(timeout_s):
                connection = await self._ask(url, _get(url, path), timeout_s, _unavailable)
                try:
                    return msgspec.json.decode(await connection.read_all(), type=answer_type)
                finally:
                    self._connections.give_back(url, connection)

    async def _ask(
        self,
        url: str,
        request: bytes,
        stall_timeout_s: float,
        refusal: Callable[[str, int, bytes], Exception],
    ) -> NodeConnection:
        """Return a connection from which the body of the answer to `request` can be read, to be
        given back.

        If the node refuses, raises what `refusal` makes of its address, status and answer.
        """
        connection = await self._connections.take(url)
        try:
            status = await connection.ask(request, stall_timeout_s=stall_timeout_s)
            if status != HTTPStatus.OK:
                raise refusal(url, status, await connection.read_all())
        except BaseException:
            self._connections.give_back(url, connection)
            raise
        return connection


def _get(url: str, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: {_host(url)}\r\n\r\n".encode()


def _post(url: str, path: str, content: bytes, *, traceparent: str | None = None) -> bytes:
    trace = "" if traceparent is None else f"{TRACEPARENT}: {traceparent}\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {_host(url)}\r\ncontent-type: application/json\r\n"
        f"{trace}content-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def _host(url: str) -> str:
    return url.partition("://")[2]


def _has_last(events: Sequence[TokenEvent]) -> bool:
    return bool(events) and events[-1].finish_reason is not None


class _Lines:
    """The lines of an answer that comes in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def ended_by(self, data: bytes) -> bytes | None:
        """Return the lines that end in the next piece, without the last one's end; None if none
        does.

        Raises:
            NodeUnavailable: a line is too long.
        """
        ended, newline, self._rest = (self._rest + data).rpartition(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise NodeUnavailable(f"node sent a line of more than {MAX_LINE_BYTES:,} bytes")
        return ended if newline else None

    def check_end(self) -> None:
        """No piece follows.

        Raises:
            NodeUnavailable: the last line has no end.
        """
        if self._rest:
            raise NodeUnavailable("node ended its answer in the middle of a line")


def _events(lines: bytes) -> tuple[list[TokenEvent], msgspec.MsgspecError | None]:
    """Return the events before the first foreign line, and what is wrong with that."""
    try:
        return _event_decoder.decode_lines(lines), None
    except msgspec.MsgspecError:
        events: list[TokenEvent] = []
        try:
            for line in filter(None, lines.split(b"\n")):
                events.append(_event_decoder.decode(line))
        except msgspec.MsgspecError as error:
            return events, error
        raise


class _NodeUnavailableIfFailed:
    """Runs its body; what goes wrong on the way to a node, or is not as agreed, is raised as
    NodeUnavailable. A class, since one made of a generator costs 3 us a request."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        match error:
            case OSError() | httptools.HttpParserError() | httptools.HttpParserUpgrade():
                reason = str(error) or type(error).__name__
                raise NodeUnavailable(f"node {self._url} does not answer: {reason}") from error
            case msgspec.MsgspecError():
                raise NodeUnavailable(f"node {self._url} gave a foreign answer: {error}") from error


def _refusal(url: str, status: int, body: bytes) -> NodeUnavailable | RequestRejected:
    # 408 and 429 are about the moment, not about the request.
    if 400 <= status < 500 and status not in {408, 429}:
        try:
            answer = _error_decoder.decode(body)
        except msgspec.MsgspecError:
            return NodeUnavailable(f"node {url} answered {status} without saying why")
        return RequestRejected(answer.message, field=answer.field)
    return _unavailable(url, status, body)


def _unavailable(url: str, status: int, body: bytes) -> NodeUnavailable:
    try:
        return NodeUnavailable(
            f"node {url} answered {status}: {_error_decoder.decode(body).message}"
        )
    except msgspec.MsgspecError:
        return NodeUnavailable(f"node {url} answered {status}")
