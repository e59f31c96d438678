"""What a worker does before its application: what other workers ask, and requests with keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import msgspec
import structlog
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.core.errors import NodeUnavailable, ProServeError
from router.errors import Refused, error_answer, error_headers
from router.idempotency import IDEMPOTENCY_HEADER
from router.metrics import CONTENT_TYPE
from router.worker_metrics import WorkerMetrics
from router.workers import HOP_HEADERS, Fellows, without

KEYED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Where an `Idempotency-Key` means something."""

_SERVER_HEADERS = frozenset({b"date", b"server"})
"""Which every worker's server adds."""

_log = structlog.get_logger("router")


class WorkerGate:
    """Lets through what this worker serves itself, and hands on what another one has to.

    Answers with a key are kept by one worker, which follows from the key: whatever worker gets the
    request, first or again, passes bytes between its client and that one, which does all the rest.
    """

    def __init__(self, app: ASGIApp, *, worker: WorkerMetrics) -> None:
        self._app = app
        self._worker = worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif is_from_fellow(scope):
            await self._serve_fellow(scope, receive, send)
        else:
            keeper = self._keeper(scope)
            if keeper in {None, self._worker.seat.index}:
                await self._app(scope, receive, send)
            else:
                await self._hand_on(keeper, scope, receive, send)

    def _keeper(self, scope: Scope) -> int | None:
        if scope["method"] != "POST" or scope["path"] not in KEYED_PATHS:
            return None
        key = Headers(scope=scope).get(IDEMPOTENCY_HEADER)
        return None if key is None else self._worker.seat.keeper_of(key)

    async def _serve_fellow(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["path"]:
            case "/health":  # of the process; the one that clients see is that of the nodes
                await Response("serving")(scope, receive, send)
            case "/metrics":
                metrics = await self._worker.own()
                await Response(metrics, media_type=CONTENT_TYPE)(scope, receive, send)
            case _:
                await self._app(scope, receive, send)

    async def _hand_on(self, keeper: int, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _HandedOn(receive, send)
        exchanging = asyncio.create_task(exchange.run(self._worker.fellows, keeper, scope))
        watching = asyncio.create_task(exchange.wait_until_client_leaves())
        try:
            await asyncio.wait({exchanging, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (exchanging, watching):
                task.cancel()
            results = await asyncio.gather(exchanging, watching, return_exceptions=True)
        failure = results[0]
        if failure is None or isinstance(failure, asyncio.CancelledError):
            return
        if not isinstance(failure, httpx.TransportError):
            raise failure
        error: ProServeError
        if isinstance(failure, httpx.LocalProtocolError):
            error = Refused(f"the request is not HTTP: {failure}", code="invalid_http")
        else:
            _log.warning("worker_lost", worker=keeper, reason=repr(failure))
            error = NodeUnavailable(
                "the part of the router that keeps the answer is starting again; repeat the request"
            )
        if exchange.has_begun:
            return  # The server cuts the connection of an answer that does not end.
        status, answer = error_answer(error)
        headers = {"content-type": "application/json", **error_headers(error)}
        await Response(msgspec.json.encode(answer), status, headers)(scope, receive, send)


class _HandedOn:
    """A request that another worker serves."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._is_read = asyncio.Event()
        self.has_begun = False
        """Whether the client has got a part of the answer."""

    async def run(self, fellows: Fellows, keeper: int, scope: Scope) -> None:
        """Pass on the body and then the answer.

        Raises:
            httpx.TransportError: the other worker does not answer, or not to the end.
        """
        async with fellows.exchange(keeper, scope, self._body()) as response:
            self._is_read.set()  # as far as the other one wants
            headers = without(response.headers.raw, HOP_HEADERS | _SERVER_HEADERS)
            start: Message = {
                "type": "http.response.start",
                "status": response.status_code,
                "headers": headers,
            }
            stream = response.stream
            assert isinstance(stream, httpx.AsyncByteStream)
            async for piece in stream:
                if not self.has_begun:
                    await self._send(start)
                    self.has_begun = True
                await self._send_body(piece, is_last=False)
            if not self.has_begun:
                await self._send(start)
                self.has_begun = True
            await self._send_body(b"", is_last=True)

    async def wait_until_client_leaves(self) -> None:
        """Return when the client, whose request has been read, is gone."""
        await self._is_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _body(self) -> AsyncIterator[bytes]:
        is_complete = False
        while not is_complete:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._is_read.set()
                raise asyncio.CancelledError  # Nobody is there to be answered.
            yield message["body"]
            is_complete = not message.get("more_body", False)
        self._is_read.set()

    async def _send_body(self, piece: bytes, *, is_last: bool) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": not is_last})


def is_from_fellow(scope: Scope) -> bool:
    """Return whether a request came over the Unix socket."""
    return scope["server"] is not None and scope["server"][1] is None
