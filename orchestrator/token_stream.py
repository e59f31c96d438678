"""Sends the token events of one request to whoever sent it. The messages are those of `wire`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from http import HTTPStatus

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.core.ports import RequestEvent
from orchestrator.wire import TokenEvent

NDJSON = "application/x-ndjson"

_json_encoder = msgspec.json.Encoder()


class TokenEventsResponse(Response):
    """Streams token events as lines of JSON, each as soon as it is there.

    Headers and first line leave together; after `heartbeat_s` without a line, an empty one does.
    A client that closes its connection, even before the first token, ends the events and thereby
    aborts the request.
    """

    def __init__(self, events: AsyncGenerator[RequestEvent], *, heartbeat_s: float) -> None:
        super().__init__(media_type=NDJSON)
        self._events = events
        self._heartbeat_s = heartbeat_s
        self._writing = asyncio.Lock()
        self._last_line_s: float | None = None
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the events end or the client leaves."""
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(_wait_for_disconnect(receive))
        beating = asyncio.create_task(self._beat(send))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for task in (writing, leaving, beating):
                task.cancel()
            await asyncio.gather(writing, leaving, beating, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                await self._write_line(_line(event), send)
        async with self._writing:
            await send({"type": "http.response.body", "body": b""})

    async def _beat(self, send: Send) -> None:
        begun_s = time.monotonic()
        while True:
            due_s = (self._last_line_s or begun_s) + self._heartbeat_s
            pause_s = due_s - time.monotonic()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            else:
                await self._write_line(b"\n", send)

    async def _write_line(self, line: bytes, send: Send) -> None:
        async with self._writing:
            if self._last_line_s is None:
                await send(
                    {
                        "type": "http.response.start",
                        "status": HTTPStatus.OK,
                        "headers": self.raw_headers,
                    }
                )
            self._last_line_s = time.monotonic()
            await send({"type": "http.response.body", "body": line, "more_body": True})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _line(event: RequestEvent) -> bytes:
    message = TokenEvent(
        new_token_ids=event.new_token_ids,
        logprobs=event.logprobs,
        finish_reason=event.finish_reason,
        error=event.error,
    )
    return _json_encoder.encode(message) + b"\n"
