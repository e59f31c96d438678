"""The router's HTTP application: OpenAI's routes over the nodes of a pool."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import structlog
from fastapi import FastAPI, Request, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from orchestrator.core.ports import Clock
from orchestrator.tracing import Tracing, tracing_of
from router.access import (
    AccessLog,
    RequestRecord,
    request_span,
)
from router.admission import Admission
from router.bodies import parsed_body, read_body
from router.client_directory import Client, ClientDirectory
from router.config import RouterConfig
from router.dashboard.observer import Observer, RecentRequests
from router.dashboard.routes import add_dashboard_routes
from router.dispatch import Dispatcher
from router.endpoints import EndpointPool
from router.error_handlers import add_error_handlers
from router.etcd_registry import EtcdRegistry
from router.generation import Generation, GenerationTools
from router.idempotency import KeptAnswers, request_key
from router.information_routes import add_information_routes
from router.metrics import RouterMetrics
from router.node_client import NodeClient
from router.nodes_file import FollowedNodes
from router.open_requests import OpenRequests
from router.outlook import FleetOutlook
from router.registration import Registrations, add_registration_routes
from router.responses import (
    AnswerFormat,
    ChatFormat,
    CompletionFormat,
)
from router.schema import ChatCompletionBody, CompletionBody
from router.streaming import AnswerHead, EventStream, WholeAnswer
from router.terms import ServiceTerms
from router.tokenization import Tokenization
from router.tokenizer import Tokenizer
from router.tool_calling import ToolCalling
from router.translation import GenerationPlan, Sender, Translator
from router.usage import OwnUsage, UsageStore
from router.worker_gate import WorkerGate
from router.worker_metrics import WorkerMetrics
from router.workers import WorkerSeat

_log = structlog.get_logger("router")


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Return seconds since some moment before the process began."""
        return time.monotonic()


class RouterService:
    """What the routes share. Belongs to one event loop, that of its application's lifespan."""

    def __init__(
        self,
        config: RouterConfig,
        tokenizer: Tokenizer,
        clock: Clock,
        *,
        tracing: Tracing | None,
        seat: WorkerSeat | None,
    ) -> None:
        self.config = config
        self.tracing = tracing
        self.tokenizer = tokenizer
        self.clock = clock
        self.metrics = RouterMetrics()
        self.open_requests = OpenRequests()
        self.created_s = int(time.time())
        self.client = NodeClient(
            connect_timeout_s=config.connect_timeout_s, stall_timeout_s=config.stall_timeout_s
        )
        self.pool = EndpointPool(config, self.client, clock, self.metrics)
        self.registrations: Registrations | None = None
        if config.registration is not None:
            self.registrations = Registrations(config.registration, self.pool, clock, self.metrics)
        self.followed_nodes: FollowedNodes | EtcdRegistry | None = None
        if config.nodes_file is not None:
            self.followed_nodes = FollowedNodes(config.nodes_file, self.pool)
        elif config.registry is not None:
            self.followed_nodes = EtcdRegistry(config.registry, self.pool, clock, self.metrics)
        store = OwnUsage() if seat is None else seat.usage()
        self.directory = _directory(config, clock, self.metrics, store)
        self._everybody = Client.everybody(
            ServiceTerms.of_everybody(config.classes, default_class=config.default_class)
        )
        self.admission = Admission(
            config.admission,
            [c.to_priority_class() for c in config.classes],
            FleetOutlook(self.pool.fleet, self.pool.offer),
            self.metrics,
            store,
        )
        tool_calling = ToolCalling(config.tool_calls, tokenizer)
        self.translator = Translator(config, tokenizer, tool_calling, self.pool)
        self.tokenization = Tokenization(
            tokenizer,
            tool_calling,
            model=config.model,
            max_model_len=self.pool.max_sequence_tokens,
        )
        self._tools = GenerationTools(
            dispatcher=Dispatcher(
                self.pool,
                self.client,
                config.make_policy(config.class_weights),
                clock,
                self.metrics,
                rules=config.retry_rules(),
            ),
            tokenizer=tokenizer,
            metrics=self.metrics,
            clock=clock,
            open_requests=self.open_requests,
        )
        self.kept_answers = KeptAnswers(
            config.idempotency.part_of(config.num_workers), clock, self.metrics
        )
        self.worker = None if seat is None else WorkerMetrics(seat, self.own_metrics)
        self.recent_requests = RecentRequests()
        self.observer = Observer(
            self.pool,
            self.recent_requests,
            own_metrics=self.all_metrics,
            class_weights=config.class_weights,
            now_s=clock.now_s,
        )

    async def start(self) -> None:
        """Begin to follow the nodes and the clients file."""
        if self.directory is None:
            _log.warning("no_clients_file", effect="whoever reaches the router may use every class")
        else:
            await self.directory.start()
        await self.pool.start()
        if self.registrations is not None:
            await self.registrations.start()
        if self.followed_nodes is not None:
            await self.followed_nodes.start()

    async def stop(self) -> None:
        """End what `start` began, and all connections."""
        await self.kept_answers.close()
        if self.registrations is not None:
            await self.registrations.stop()
        if self.followed_nodes is not None:
            await self.followed_nodes.stop()
        await self.pool.stop()
        if self.directory is not None:
            await self.directory.stop()
        self.client.close()
        await self.observer.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        if self.worker is not None:
            await self.worker.fellows.close()

    def end_open_requests(self) -> None:
        """Let every generation fail from now on, and end what goes on for ever."""
        self.open_requests.end_all()
        self.observer.end_all()

    async def all_metrics(self) -> str:
        """Return what all workers of the router have counted."""
        return await (self.own_metrics() if self.worker is None else self.worker.of_all())

    async def own_metrics(self) -> str:
        """Return what this process has counted, as Prometheus text."""
        text = await asyncio.to_thread(
            self.metrics.render,
            self.pool.obstacles(self.clock.now_s()),
            num_waiting=self.admission.num_waiting,
            num_sequences=self.pool.num_sequences(),
        )
        return text.decode()

    def identify(self, request: Request) -> Client:
        """Return who sends a request; without a clients file, everybody.

        Raises:
            Unauthenticated: it has no valid key.
        """
        record: RequestRecord = request.state.record
        if self.directory is None:
            record.identify(self._everybody, None)
            return self._everybody
        client, key_id = self.directory.identify(request.headers, datetime.now(UTC))
        record.identify(client, key_id)
        return client

    def take_request(self, request: Request) -> Client:
        """Return who sends a request for a generation, and count it.

        Raises:
            Unauthenticated: it has no valid key.
            TooManyRequests: its client may not send another one yet.
        """
        client = self.identify(request)
        client.limiter.take_request(self.clock.now_s())
        return client

    def answer(
        self,
        plan: GenerationPlan,
        answer_format: AnswerFormat,
        record: RequestRecord,
        client: Client,
    ) -> Response:
        """Return the response that runs `plan`.

        Raises:
            TooManyRequests, Refused: as `Admission.admit`.
        """
        plan, lease = self.admission.admit(plan, client, self.clock.now_s())
        head = AnswerHead(
            completion_id=f"{answer_format.id_prefix}{uuid.uuid4().hex}",
            created_s=int(time.time()),
            model=plan.model,
            num_choices=len(plan.sequences),
        )
        generation = Generation(head.completion_id, plan, self._tools, record, lease)
        self.recent_requests.add(record)
        if plan.is_stream:
            return EventStream(head, generation, answer_format, plan.stream_options, record)
        return WholeAnswer(head, generation, answer_format, record)

    async def read(self, request: Request) -> bytes:
        """Return a request's body.

        Raises:
            RequestRejected: it cannot be read.
            NodeUnavailable: the router is shutting down.
        """
        with self.open_requests.until_shutdown():
            return await read_body(
                request,
                max_bytes=self.config.max_body_bytes,
                timeout_s=self.config.body_timeout_s,
            )

    async def once(
        self, request: Request, begin: Callable[[bytes, Sender], Awaitable[Response]]
    ) -> Response:
        """Return the response to a request for a generation: what `begin` makes of its body and
        sender, unless an earlier request with the same key has an answer.

        Raises:
            RequestRejected: the sender may not do that, or not now; the body cannot be read; or
                something in the request is wrong.
            NodeUnavailable: the router is shutting down, or no node has said what it can serve.
        """
        record: RequestRecord = request.state.record
        if self.tracing is not None:
            record.span = request_span(self.tracing, request, record.request_id)
        client = self.take_request(request)
        content = await self.read(request)
        key = request_key(request, content, client_name=client.name)
        seed_source = None if key is None else key.seed_source
        sender = Sender(client, request.headers, record.arrival_s, seed_source)
        if key is None:
            return await begin(content, sender)
        kept = self.kept_answers.find(key, record)
        if kept is None:
            self.kept_answers.check_room()
            kept = self.kept_answers.keep(key, await begin(content, sender), request)
        return kept


def create_app(
    config: RouterConfig,
    *,
    tokenizer: Tokenizer | None = None,
    clock: Clock | None = None,
    tracing: Tracing | None = None,
    seat: WorkerSeat | None = None,
) -> FastAPI:
    """Return the router's ASGI application; its lifespan is that of the connections to nodes.

    Without `tokenizer` the one of `config.engine_dir` is loaded; `tracing` takes the place of what
    `config.tracing` says; `seat` is that of one of several workers. `app.state.end_open_requests`
    is for its server, to be called on its event loop: from then on every generation, those under
    way and those to come, fails with NodeUnavailable.

    Raises:
        EngineDirectoryError: the engine directory has no usable tokenizer.
        ConfigError: the clients file or the nodes' secret cannot be read or has mistakes, or
            what tracing needs is not installed.
    """
    service = RouterService(
        config,
        tokenizer or Tokenizer.from_engine_dir(config.engine_dir),
        clock or MonotonicClock(),
        tracing=tracing or tracing_of(config.tracing, service_name="proserve-router"),
        seat=seat,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    # Bodies are read and checked here, not by FastAPI, so its own schema would have none.
    app = FastAPI(
        title="ProServe router", lifespan=lifespan, openapi_url=None, redirect_slashes=False
    )
    app.state.end_open_requests = service.end_open_requests
    app.add_middleware(AccessLog, clock=service.clock, metrics=service.metrics)
    if service.worker is not None:
        app.add_middleware(WorkerGate, worker=service.worker)
    _add_generation_routes(app, service)
    add_information_routes(app, service)
    if service.registrations is not None:
        add_registration_routes(app, service.registrations)
    if config.dashboard.is_enabled:
        key = config.dashboard.key
        secret = None if key is None else key.read_secret()
        add_dashboard_routes(app, service.observer, service.recent_requests, secret)
    add_error_handlers(app)
    return app


def _add_generation_routes(app: FastAPI, service: RouterService) -> None:
    async def chat_completions(request: Request) -> Response:
        record: RequestRecord = request.state.record

        async def begin(content: bytes, sender: Sender) -> Response:
            body = parsed_body(content, ChatCompletionBody)
            plan = await service.translator.plan_chat(body, sender)
            answer_format = ChatFormat(
                service.tokenizer,
                has_logprobs=bool(body.logprobs),
                may_call=plan.tools is not None,
            )
            return service.answer(plan, answer_format, record, sender.client)

        return await service.once(request, begin)

    async def completions(request: Request) -> Response:
        record: RequestRecord = request.state.record

        async def begin(content: bytes, sender: Sender) -> Response:
            body = parsed_body(content, CompletionBody)
            plan = await service.translator.plan_completion(body, sender)
            answer_format = CompletionFormat(
                service.tokenizer,
                has_logprobs=body.logprobs is not None,
                echoes=[sequence.prompt.echo for sequence in plan.sequences],
            )
            return service.answer(plan, answer_format, record, sender.client)

        return await service.once(request, begin)

    # Starlette's routes: FastAPI's resolve parameters, of which these have none, and cost a tenth
    # of a request for it.
    for path, endpoint in (
        ("/v1/chat/completions", chat_completions),
        ("/v1/completions", completions),
    ):
        app.router.routes.append(_PostRoute(path, endpoint, methods=["POST"]))


class _PostRoute(Route):
    """A route that says which it is, as FastAPI's do."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether this is the route of a request, and what to add to its scope."""
        match, found = super().matches(scope)
        return match, {**found, "route": self}


def _directory(
    config: RouterConfig, clock: Clock, metrics: RouterMetrics, store: UsageStore
) -> ClientDirectory | None:
    """Return the clients; None if everybody may use the router."""
    if config.clients_file is None:
        return None
    return ClientDirectory(
        config.clients_file,
        config.classes,
        clock,
        metrics,
        poll_interval_s=config.clients_poll_interval_s,
        store=store,
    )
