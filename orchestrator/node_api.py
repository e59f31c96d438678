"""A node's HTTP service: token ids in, token events out. The messages are those of `wire`."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from http import HTTPStatus
from typing import Protocol

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from orchestrator.core.admission import check_request, check_resume_point
from orchestrator.core.errors import NodeUnavailable, ProServeError, RequestRejected
from orchestrator.core.ports import RequestEvent
from orchestrator.core.request import FinishReason
from orchestrator.executor_client import ExecutorClient
from orchestrator.journal import Journal
from orchestrator.metrics import NodeMetrics
from orchestrator.token_stream import NDJSON, TokenEventsResponse
from orchestrator.tracing import TRACEPARENT, Attributes, Span, Tracing
from orchestrator.wire import (
    EngineReady,
    ErrorBody,
    GenerateRequest,
    NodeDescription,
    NodeSnapshot,
    StepReport,
)

SNAPSHOT_HEARTBEAT_S = 0.5
"""Snapshots are streamed at least this often, so that a router can tell silence from calm."""

SNAPSHOT_PAUSE_S = 0.05
"""Between two snapshots of a stream, whatever the news: a burst of requests makes few lines."""

_FAILURES = frozenset({FinishReason.ERROR, FinishReason.LOST})

_generate_decoder = msgspec.json.Decoder(GenerateRequest)
_json_encoder = msgspec.json.Encoder()


class Membership(Protocol):
    """A node's place among those that routers use: at the routers themselves, or in etcd."""

    @property
    def has_lost_lease(self) -> bool:
        """Return whether the node had a place, and has it no more for all it knows."""

    def start(self) -> None:
        """Take it, and keep it until `leave`."""

    async def leave(self) -> None:
        """Give it up."""

    async def close(self) -> None:
        """Leave, and end all connections. No call follows."""


class NodeService:
    """What the routes share."""

    def __init__(
        self, endpoint_id: str, executor_command: Sequence[str], *, stall_timeout_s: float
    ) -> None:
        self.registrar: Membership | None = None
        """How routers are told of this node; set before it starts, if at all."""

        self.endpoint_id = endpoint_id
        self.instance_id = uuid.uuid4().hex
        self.metrics = NodeMetrics()
        self.tracing: Tracing | None = None
        """Makes spans of requests; set before the node starts, if at all."""

        self._is_ending = False
        self._num_listeners = 0
        """Routers that follow the snapshots."""

        self._spans: dict[str, Span] = {}
        """Of sampled requests that have not ended."""

        self.journal = Journal()
        """What became of recent requests."""

        self.executor = ExecutorClient(
            executor_command, on_step=self._step_done, stall_timeout_s=stall_timeout_s
        )

    @property
    def is_fenced(self) -> bool:
        """Return whether the node must take nothing, as its requests may go on elsewhere.

        Its registration has run out, and no router listens to it. Where one does, it is the
        registry that is away, which shall stop nobody's work.
        """
        registrar = self.registrar
        return registrar is not None and registrar.has_lost_lease and self._num_listeners == 0

    def ready(self) -> EngineReady:
        """Return what the engine said when it was loaded.

        Raises:
            NodeUnavailable: the engine is not serving; the message says why.
        """
        trouble, ready = self.executor.trouble, self.executor.ready
        if trouble is not None or ready is None:
            raise NodeUnavailable(trouble or "the engine is loading")
        return ready

    def start(
        self, body: GenerateRequest, traceparents: Sequence[str] = ()
    ) -> AsyncGenerator[RequestEvent]:
        """Check one request and return its events, which run once they are iterated.

        `traceparents` are its headers of that name.

        Raises:
            NodeUnavailable: the engine is not serving.
            RequestRejected: the request can never run here.
        """
        ready = self.ready()
        if self.is_fenced:
            raise NodeUnavailable(
                "the node's registration has ended and no router listens to it, so it is cut off"
            )
        try:
            spec = body.to_spec()
        except ValueError as error:
            raise RequestRejected(str(error), field="slo") from error
        check_request(spec, ready.capabilities)
        if body.resume_from is not None:
            check_resume_point(spec, body.resume_from)
        arrival_s = time.monotonic() - body.elapsed_s
        span: Span | None = None
        if self.tracing is not None:
            attributes = _span_attributes(body, self.endpoint_id, ready.model)
            span = self.tracing.begin("generate", traceparents, attributes)
        events = self._counted(self.executor.generate(spec, arrival_s, body.resume_from), body)
        return events if span is None else self._traced(events, body.request_id, span)

    def snapshot(self) -> NodeSnapshot:
        """Return what the node holds now.

        Raises:
            NodeUnavailable: the engine is not serving.
        """
        self.ready()
        held = self.executor.held()
        if held is None:
            raise NodeUnavailable("the engine has not reported its load yet")
        return NodeSnapshot(
            endpoint_id=self.endpoint_id,
            instance_id=self.instance_id,
            seq_no=held.seq_no,
            age_s=held.age_s,
            load=held.load,
            queue=held.queue,
            is_draining=self.executor.is_draining,
        )

    async def snapshots(self) -> AsyncGenerator[bytes]:
        """Yield a line with a snapshot now and whenever there is news, until the engine is not
        serving, or the node is about to end and has nothing left: it would wait for its readers."""
        self._num_listeners += 1
        try:
            async for line in self._lines_for_listener():
                yield line
        finally:
            self._num_listeners -= 1

    async def _lines_for_listener(self) -> AsyncGenerator[bytes]:
        while not self._is_ending or self.executor.num_streams > 0:
            news = self.executor.next_news
            try:
                line = _json_encoder.encode(self.snapshot()) + b"\n"
            except NodeUnavailable:
                return  # who asks for a snapshot is told why
            yield line
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), SNAPSHOT_HEARTBEAT_S)
            await asyncio.sleep(SNAPSHOT_PAUSE_S)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the executor process, and be registered once its engine is loaded."""
        async with contextlib.AsyncExitStack() as stack:
            if self.tracing is not None:
                stack.push_async_callback(asyncio.to_thread, self.tracing.close)
            await stack.enter_async_context(self.executor)
            if self.registrar is not None:
                stack.push_async_callback(self.registrar.close)
                registering = asyncio.create_task(self._register_once_loaded(self.registrar))
                stack.callback(registering.cancel)
            yield

    async def begin_shutdown(self) -> None:
        """Drain, and say so to those who listen only while there is something left."""
        self._is_ending = True
        await self.drain()

    async def drain(self) -> None:
        """Finish what runs and refuse what comes."""
        await self.executor.drain()
        if self.registrar is not None:
            await self.registrar.leave()

    async def _register_once_loaded(self, registrar: Membership) -> None:
        await self.executor.wait_until_loaded()
        if not self.executor.has_failed and not self.executor.is_draining:
            registrar.start()

    async def _counted(
        self, generated: AsyncGenerator[RequestEvent], body: GenerateRequest
    ) -> AsyncGenerator[RequestEvent]:
        """Count the request, and note in the journal when it comes, begins to answer and ends."""
        book = self.journal.begin(body.request_id)
        num_delivered = len(body.resume_from.output_token_ids) if body.resume_from else None
        book.note(
            "received",
            instance_id=self.instance_id,
            num_prompt_tokens=len(body.prompt_token_ids),
            num_delivered_tokens=num_delivered,
        )
        num_tokens, reason = 0, FinishReason.ABORT  # if the client leaves before the end
        try:
            async with contextlib.aclosing(generated) as events:
                async for event in events:
                    if event.new_token_ids and not num_tokens:
                        book.note("first_token")
                    num_tokens += len(event.new_token_ids)
                    reason = event.finish_reason or reason
                    yield event
        finally:
            book.note("finished", reason=reason.value, num_tokens=num_tokens)
            self.metrics.request_ended(reason, priority_class=body.priority_class)

    async def _traced(
        self, generated: AsyncGenerator[RequestEvent], request_id: str, span: Span
    ) -> AsyncGenerator[RequestEvent]:
        self._spans[request_id] = span
        span.event("queued")
        num_tokens = 0
        reason, failure = FinishReason.ABORT, None
        try:
            async with contextlib.aclosing(generated) as events:
                async for event in events:
                    if event.new_token_ids and not num_tokens:
                        span.event("first_token")
                    num_tokens += len(event.new_token_ids)
                    reason = event.finish_reason or reason
                    yield event
            failure = reason.value if reason in _FAILURES else None
        except ProServeError as error:
            failure = type(error).__name__
            raise
        finally:
            self._spans.pop(request_id, None)
            span.event("finished")
            span.note(
                {
                    "gen_ai.usage.output_tokens": num_tokens,
                    "gen_ai.response.finish_reasons": [reason.value],
                }
            )
            span.end(failure)

    def _step_done(self, report: StepReport) -> None:
        self.metrics.step_done(report)
        now_s = time.monotonic()
        for mark in report.marks:
            ago_s = now_s - mark.began_s
            if (book := self.journal.book(mark.request_id)) is not None:
                book.note(
                    mark.name,
                    ago_s=ago_s,
                    num_tokens=mark.num_tokens,
                    num_blocks=mark.num_blocks,
                    step_id=report.step_id,
                )
            span = self._spans.get(mark.request_id)
            if span is not None:
                figures = {"num_tokens": mark.num_tokens, "num_blocks": mark.num_blocks}
                attributes = {f"proserve.{name}": value for name, value in figures.items()}
                attributes["proserve.step_id"] = report.step_id
                span.event(mark.name, attributes, ago_s=ago_s)


def create_node_app(service: NodeService) -> FastAPI:
    """Return the node's ASGI application; its lifespan is the executor process's life."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="ProServe node", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.begin_shutdown = service.begin_shutdown
    app.state.end_open_requests = lambda: service.executor.end_streams("the node is shutting down")

    @app.exception_handler(RequestRejected)
    async def rejected(_: Request, error: RequestRejected) -> Response:
        return _error(HTTPStatus.BAD_REQUEST, str(error), error.field)

    @app.exception_handler(NodeUnavailable)
    async def unavailable(_: Request, error: NodeUnavailable) -> Response:
        return _error(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    @app.post("/v1/generate")
    async def generate(request: Request) -> Response:
        try:
            body = _generate_decoder.decode(await request.body())
        except msgspec.DecodeError as error:
            return _error(HTTPStatus.BAD_REQUEST, f"unreadable request: {error}")
        events = service.start(body, request.headers.getlist(TRACEPARENT))
        return TokenEventsResponse(events, heartbeat_s=body.heartbeat_s)

    @app.get("/v1/node")
    async def describe() -> Response:
        ready = service.ready()
        return _json(
            NodeDescription(
                endpoint_id=service.endpoint_id,
                instance_id=service.instance_id,
                model=ready.model,
                capabilities=ready.capabilities,
                latency_profile=ready.latency_profile,
                manifest_sha256=ready.manifest_sha256,
            )
        )

    @app.get("/v1/snapshot")
    async def snapshot() -> Response:
        return _json(service.snapshot())

    @app.get("/v1/snapshots")
    async def snapshots() -> Response:
        service.snapshot()  # refused here and now if there is none to begin with
        return StreamingResponse(service.snapshots(), media_type=NDJSON)

    @app.post("/v1/drain")
    async def drain() -> Response:
        await service.drain()
        return _json({"open_requests": service.executor.num_streams})

    _add_watching_routes(app, service)
    return app


def _add_watching_routes(app: FastAPI, service: NodeService) -> None:
    """Serve what those who watch a node ask for."""

    @app.get("/v1/requests/{request_id}")
    async def story(request_id: str) -> Response:
        book = service.journal.book(request_id)
        if book is None:
            message = f"nothing is known of request {request_id[:128]!r}; it may be long ago"
            return _error(HTTPStatus.NOT_FOUND, message)
        return _json(book.story(request_id))

    @app.get("/health")
    async def health() -> Response:
        trouble = service.executor.trouble
        if trouble is not None:
            body = ErrorBody(trouble, is_final=service.executor.has_failed)
            return _json(body, HTTPStatus.SERVICE_UNAVAILABLE)
        status = "draining" if service.executor.is_draining else "ready"
        return _json({"status": "fenced" if service.is_fenced else status})

    @app.get("/metrics")
    async def metrics() -> Response:
        ready = service.executor.ready
        text = await asyncio.to_thread(
            service.metrics.render,
            service.executor.last_load,
            None if ready is None else ready.capabilities,
        )
        return Response(text, media_type="text/plain; version=0.0.4")


def _span_attributes(body: GenerateRequest, endpoint_id: str, model: str) -> Attributes:
    num_delivered = len(body.resume_from.output_token_ids) if body.resume_from else None
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "proserve",
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": body.sampling.max_tokens,
        "gen_ai.usage.input_tokens": len(body.prompt_token_ids),
        "proserve.endpoint_id": endpoint_id,
        "proserve.sequence_id": body.request_id,
        "proserve.priority_class": body.priority_class,
        "proserve.weight": body.weight,
        "proserve.elapsed_s": body.elapsed_s,
        "proserve.num_delivered_tokens": num_delivered,
    }


def _json(value: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(_json_encoder.encode(value), status, media_type="application/json")


def _error(status: HTTPStatus, message: str, field: str | None = None) -> Response:
    return _json(ErrorBody(message, field), status)
