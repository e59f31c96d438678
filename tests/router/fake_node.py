"""A node without an engine: speaks `orchestrator.wire` strictly and plays a script."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from orchestrator.core.ports import SchedulerLoad
from orchestrator.core.request import FinishReason
from orchestrator.wire import (
    ErrorBody,
    GenerateRequest,
    NodeDescription,
    NodeSnapshot,
    TokenEvent,
)
from tests.factories import make_capabilities, make_profile, make_queue_summary
from tests.router.servers import DEADLINE_S, RunningServer


@dataclass(frozen=True)
class Refuse:
    """Answer with an error status; only as first step."""

    status: int
    message: str = "as the script says"
    field: str | None = None


@dataclass(frozen=True)
class Beat:
    """Give one sign of life."""


@dataclass(frozen=True)
class Stall:
    """Give signs of life alone until the test calls `release` or the caller leaves."""

    is_silent: bool = False
    """Not even those, so that the answer has not begun."""


@dataclass(frozen=True)
class Hang:
    """Say nothing until the caller leaves, as a stopped process does."""


@dataclass(frozen=True)
class Drop:
    """Cut the connection in the middle of the answer."""


@dataclass(frozen=True)
class Raw:
    """Send these bytes as they are."""

    data: bytes


Step = TokenEvent | Refuse | Beat | Stall | Hang | Drop | Raw
Script = Callable[[GenerateRequest], Sequence[Step]]


def saying(
    token_ids: Sequence[int], *, finish: FinishReason = FinishReason.STOP, tokens_per_event: int = 1
) -> Script:
    """Return a script that produces these tokens, as many as the request allows.

    Of a resumed request it produces the rest, and refuses one with other tokens before.
    """

    def script(request: GenerateRequest) -> list[Step]:
        allowed = list(token_ids)[: request.sampling.max_tokens]
        reason = finish if len(allowed) == len(token_ids) else FinishReason.LENGTH
        delivered = list(request.resume_from.output_token_ids) if request.resume_from else []
        if delivered != allowed[: len(delivered)]:
            return [Refuse(400, f"resumed behind {delivered}, said is {allowed}")]
        pieces = [
            tuple(allowed[start : start + tokens_per_event])
            for start in range(len(delivered), len(allowed), tokens_per_event)
        ]
        return [
            *(TokenEvent(new_token_ids=piece) for piece in pieces[:-1]),
            TokenEvent(new_token_ids=pieces[-1], finish_reason=reason),
        ]

    return script


class FakeNode:
    """One node; its attributes may be changed while it runs."""

    def __init__(self, endpoint_id: str = "node-0", *, model: str = "tiny") -> None:
        self.endpoint_id = endpoint_id
        self.instance_id = uuid.uuid4().hex
        self.url = ""
        """Set by who serves it."""

        self.model = model
        self.max_model_len = 256
        self.num_device_blocks = 1000
        self.grammar_obstacle: str | None = None
        self.script: Script = saying([65])
        self.num_queued_prompt_tokens = 0
        self.is_draining = False
        self.is_ill = False
        """Answers everything with 503."""

        self.requests: list[GenerateRequest] = []
        """In order of arrival."""

        self.traceparents: list[str | None] = []
        """Headers of that name, one for each request."""

        self.aborted_ids: list[str] = []
        """Requests whose caller left before the end."""

        self.snapshot_lines: asyncio.Queue[bytes | None] | None = None
        """What is sent on its stream of snapshots, up to None, which ends it; a node without a
        queue has no such stream."""

        self.num_streams = 0
        """Streams of snapshots that were begun."""

        self.num_polls = 0
        self.num_beats = 0
        """Signs of life during stalls."""

        self.generate_connections: set[object] = set()
        """Remote addresses that sent requests."""

        self._changed = threading.Condition()
        self._released = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve(self, *, port: int = 0) -> RunningServer:
        """Return the server to run this node in."""
        return RunningServer(self, port=port)

    def release(self) -> None:
        """End every stall, now and later."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._released.set)

    def wait_until(self, is_met: Callable[[FakeNode], bool], what: str) -> None:
        """Wait until something is true of this node."""
        with self._changed:
            assert self._changed.wait_for(lambda: is_met(self), DEADLINE_S), f"never: {what}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, as an ASGI application."""
        self._loop = asyncio.get_running_loop()
        if scope["type"] == "lifespan":
            raise NotImplementedError  # As applications do that have no use for it.
        if self.is_ill:
            await _answer(send, 503, ErrorBody("ill, as the test says"))
            return
        match scope["path"]:
            case "/v1/node":
                await _answer(send, 200, self._description())
            case "/v1/snapshot":
                self._note(self._count_poll)
                await _answer(send, 200, self.snapshot())
            case "/v1/snapshots" if self.snapshot_lines is not None:
                await self._stream_snapshots(self.snapshot_lines, send)
            case "/v1/generate":
                self.generate_connections.add(scope["client"])
                self.traceparents.append(Headers(scope=scope).get("traceparent"))
                await self._generate(receive, send)
            case path:
                await _answer(send, 404, ErrorBody(f"unknown path {path}"))

    def tell(self, line: bytes | None) -> None:
        """Send a line on the stream of snapshots, or end it."""
        assert self._loop is not None
        assert self.snapshot_lines is not None
        self._loop.call_soon_threadsafe(self.snapshot_lines.put_nowait, line)

    async def _stream_snapshots(self, lines: asyncio.Queue[bytes | None], send: Send) -> None:
        self._note(self._count_stream)
        await send(_start(200, b"application/x-ndjson"))
        while (line := await lines.get()) is not None:
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _generate(self, receive: Receive, send: Send) -> None:
        body = b""
        is_complete = False
        while not is_complete:
            message = await receive()
            body += message["body"]
            is_complete = not message["more_body"]
        try:
            request = msgspec.json.decode(body, type=GenerateRequest)
            request.to_spec()
        except (msgspec.MsgspecError, ValueError) as error:
            await _answer(send, 400, ErrorBody(f"unreadable request: {error}"))
            return
        self._note(lambda: self.requests.append(request))
        playing = asyncio.create_task(self._play(request, send))
        leaving = asyncio.create_task(_disconnect(receive))
        await asyncio.wait({playing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not playing.done():
            self._note(lambda: self.aborted_ids.append(request.request_id))
        for task in (playing, leaving):
            task.cancel()
        results = await asyncio.gather(playing, leaving, return_exceptions=True)
        if isinstance(results[0], ConnectionAbortedError):
            raise results[0]

    async def _play(self, request: GenerateRequest, send: Send) -> None:
        has_begun = False
        for step in self.script(request):
            if isinstance(step, Refuse):
                await _answer(send, step.status, ErrorBody(step.message, step.field))
                return
            if isinstance(step, Hang):
                await asyncio.Event().wait()
                return
            if isinstance(step, Stall) and (step.is_silent or self._released.is_set()):
                await self._released.wait()
                continue
            if not has_begun:
                await send(_start(200, b"application/x-ndjson"))
                has_begun = True
            if isinstance(step, Drop):
                # uvicorn cuts the connection of an application that fails after its headers.
                raise ConnectionAbortedError
            if isinstance(step, Stall):
                await self._stay_alive(request.heartbeat_s, send)
                continue
            await _send_some(send, _data(step))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stay_alive(self, heartbeat_s: float, send: Send) -> None:
        while not self._released.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(heartbeat_s):
                    await self._released.wait()
            await _send_some(send, _data(Beat()))
            self._note(self._count_beat)

    def _description(self) -> NodeDescription:
        return NodeDescription(
            endpoint_id=self.endpoint_id,
            instance_id=self.instance_id,
            model=self.model,
            capabilities=make_capabilities(
                max_model_len=self.max_model_len,
                num_device_blocks=self.num_device_blocks,
                grammar_obstacle=self.grammar_obstacle,
            ),
            latency_profile=make_profile(),
            manifest_sha256="0" * 64,
        )

    def snapshot(self) -> NodeSnapshot:
        """Return what the node says it holds."""
        return NodeSnapshot(
            endpoint_id=self.endpoint_id,
            instance_id=self.instance_id,
            seq_no=self.num_polls,
            load=SchedulerLoad(
                num_waiting=0,
                num_running=0,
                num_decoding=0,
                num_queued_prompt_tokens=self.num_queued_prompt_tokens,
                num_free_device_blocks=self.num_device_blocks,
                num_device_blocks=self.num_device_blocks,
            ),
            queue=make_queue_summary(*self._queued_prompt()),
            age_s=0.0,
            is_draining=self.is_draining,
        )

    def _queued_prompt(self) -> list[tuple[None, float, float]]:
        """Return all that is queued as one prompt without a deadline."""
        num_tokens = self.num_queued_prompt_tokens
        return [(None, 1.0, make_profile().prefill_s(num_tokens, 0))] if num_tokens else []

    def _count_stream(self) -> None:
        self.num_streams += 1

    def _count_poll(self) -> None:
        self.num_polls += 1

    def _count_beat(self) -> None:
        self.num_beats += 1

    def _note(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()


def _data(step: TokenEvent | Beat | Raw) -> bytes:
    match step:
        case Raw(data):
            return data
        case Beat():
            return b"\n"
        case TokenEvent():
            return msgspec.json.encode(step) + b"\n"


async def _send_some(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, value: msgspec.Struct) -> None:
    await send(_start(status, b"application/json"))
    await send({"type": "http.response.body", "body": msgspec.json.encode(value)})


def _start(status: int, content_type: bytes) -> Message:
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", content_type)],
    }
