"""HTTP calls to a node. Whatever goes wrong comes out as one of our errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import aiohttp
import httpx
import msgspec
from httpx_aiohttp import AiohttpTransport

from orchestrator.core.errors import NodeUnavailable, RequestRejected
from orchestrator.wire import (
    ErrorBody,
    GenerateRequest,
    NodeDescription,
    NodeSnapshot,
    TokenEvent,
)
from router.upstream_socket import open_upstream_socket

Answer = TypeVar("Answer")

# A node's server (uvicorn) closes idle connections after 5 s; being first avoids sending a
# request into a connection that is just being closed.
KEEPALIVE_S = 3.0
MAX_LINE_BYTES = 1024 * 1024

HEARTBEATS_PER_STALL = 5
"""Signs of life that a node gets the time to send before its silence ends a sequence: a few may
be late on a busy machine."""

_encoder = msgspec.json.Encoder()
_event_decoder = msgspec.json.Decoder(TokenEvent)
_snapshot_decoder = msgspec.json.Decoder(NodeSnapshot)
_error_decoder = msgspec.json.Decoder(ErrorBody)


class NodeClient:
    """Talks to any number of nodes over kept connections. Belongs to one event loop.

    httpx runs on aiohttp's transport: its own costs six times the CPU per request.
    """

    def __init__(self, *, connect_timeout_s: float, stall_timeout_s: float) -> None:
        """A node that is silent on a sequence for `stall_timeout_s` has lost it; it is asked for
        signs of life that come several times as often."""
        self._heartbeat_s = stall_timeout_s / HEARTBEATS_PER_STALL
        self._timeout = httpx.Timeout(
            connect=connect_timeout_s, read=stall_timeout_s, write=stall_timeout_s, pool=None
        )
        transport = AiohttpTransport(client=_open_session)
        # No proxies and credentials from the environment: nodes are addressed as configured.
        self._http = httpx.AsyncClient(transport=transport, trust_env=False)

    async def close(self) -> None:
        """Close all connections. No call follows."""
        await self._http.aclose()

    async def describe(self, url: str, *, timeout_s: float) -> NodeDescription:
        """Return what the node at `url` serves.

        Raises:
            NodeUnavailable: there is no usable answer within `timeout_s`.
        """
        return await self._get(f"{url}/v1/node", NodeDescription, timeout_s)

    async def snapshot(self, url: str, *, timeout_s: float) -> NodeSnapshot:
        """Return the load of the node at `url`.

        Raises:
            NodeUnavailable: there is no usable answer within `timeout_s`.
        """
        return await self._get(f"{url}/v1/snapshot", NodeSnapshot, timeout_s)

    async def snapshots(self, url: str, *, timeout_s: float) -> AsyncGenerator[NodeSnapshot]:
        """Yield the load of the node at `url` whenever it changes, until the node ends it.

        Raises:
            NodeUnavailable: the node has no such stream, or is silent for `timeout_s`.
        """
        with _as_node_unavailable(url):
            async with self._http.stream(
                "GET", f"{url}/v1/snapshots", timeout=timeout_s
            ) as response:
                if response.status_code != httpx.codes.OK:
                    raise NodeUnavailable(_explain(url, response.status_code, b""))
                async for line in response.aiter_lines():
                    yield _snapshot_decoder.decode(line)

    async def generate(
        self, url: str, request: GenerateRequest
    ) -> AsyncGenerator[Sequence[TokenEvent]]:
        """Yield the events of one sequence up to the one with a `finish_reason`.

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
        is_finished = False
        try:
            with _as_node_unavailable(url):
                async with self._http.stream(
                    "POST",
                    f"{url}/v1/generate",
                    content=_encoder.encode(request),
                    headers={"content-type": "application/json", "accept-encoding": "identity"},
                    timeout=self._timeout,
                ) as response:
                    if response.status_code != httpx.codes.OK:
                        raise _refusal(url, response.status_code, await response.aread())
                    async for events in _events(response):
                        is_finished = is_finished or _has_last(events)
                        yield events
                        # Read on to the end of the answer, so that the connection can be kept.
        except NodeUnavailable:
            # Once everything was said, it does not matter how the connection ends.
            if not is_finished:
                raise
        else:
            if not is_finished:
                raise NodeUnavailable(f"node {url} ended its answer before the request's end")

    async def _get(self, url: str, answer_type: type[Answer], timeout_s: float) -> Answer:
        with _as_node_unavailable(url):
            response = await self._http.get(url, timeout=timeout_s)
            if response.status_code != httpx.codes.OK:
                raise NodeUnavailable(_explain(url, response.status_code, response.content))
            return msgspec.json.decode(response.content, type=answer_type)


def _open_session() -> aiohttp.ClientSession:
    # The router bounds its load elsewhere; here a limit would only queue requests unseen.
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=KEEPALIVE_S, socket_factory=open_upstream_socket
    )
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


def _has_last(events: Sequence[TokenEvent]) -> bool:
    return bool(events) and events[-1].finish_reason is not None


async def _events(response: httpx.Response) -> AsyncGenerator[Sequence[TokenEvent]]:
    rest = b""
    async for chunk in response.aiter_raw():
        lines = (rest + chunk).split(b"\n")
        rest = lines.pop()
        if len(rest) > MAX_LINE_BYTES:
            raise NodeUnavailable(f"node sent a line of more than {MAX_LINE_BYTES:,} bytes")
        events: list[TokenEvent] = []
        try:
            for line in lines:
                if line:
                    events.append(_event_decoder.decode(line))
        except msgspec.MsgspecError:
            if events:
                yield events
            raise
        if lines:
            yield events
    if rest:
        raise NodeUnavailable("node ended its answer in the middle of a line")


@contextmanager
def _as_node_unavailable(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, aiohttp.ClientError, TimeoutError) as error:
        # The transport names timeouts and lost connections alike; its cause is the true one.
        cause = error.__cause__ or error
        reason = str(cause) or type(cause).__name__
        raise NodeUnavailable(f"node {url} does not answer: {reason}") from error
    except msgspec.MsgspecError as error:
        raise NodeUnavailable(f"node {url} gave a foreign answer: {error}") from error


def _refusal(url: str, status: int, body: bytes) -> NodeUnavailable | RequestRejected:
    # 408 and 429 are about the moment, not about the request.
    if 400 <= status < 500 and status not in {408, 429}:
        try:
            answer = _error_decoder.decode(body)
        except msgspec.MsgspecError:
            return NodeUnavailable(f"node {url} answered {status} without saying why")
        return RequestRejected(answer.message, field=answer.field)
    return NodeUnavailable(_explain(url, status, body))


def _explain(url: str, status: int, body: bytes) -> str:
    try:
        return f"node {url} answered {status}: {_error_decoder.decode(body).message}"
    except msgspec.MsgspecError:
        return f"node {url} answered {status}"
