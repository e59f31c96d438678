"""Request ids, one log line and the counters of each request, whatever becomes of it.

A plain ASGI class: a middleware made with FastAPI's decorator doubles the cost of a stream.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import structlog
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.core.ports import Clock
from orchestrator.journal import StoryBook
from orchestrator.tracing import TRACEPARENT, Attributes, Span, Tracing
from router.admission import Lease
from router.client_directory import Client
from router.errors import ErrorAnswer
from router.keys import redacted
from router.metrics import ClassMetrics, ClientMetrics, RouterMetrics
from router.translation import GenerationPlan

REQUEST_ID_HEADER = "X-Request-Id"
SERVED_AS_HEADER = "X-ProServe-Served-As"
CLIENT_LEFT_STATUS = 499
"""Counted for clients that left before their answer began; nginx's number."""

REFUSED_STATUSES = frozenset({401, 403, 429})
"""Of requests whose sender may not do that, or not now."""

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_log = structlog.get_logger("router")


@dataclass(slots=True)
class RequestRecord:
    """What is noted about one HTTP request while it is served."""

    request_id: str
    arrival_s: float
    metrics: RouterMetrics
    client: Client | None = None
    """None until the sender is known."""

    key_id: str | None = None
    """Of the API key, where there are any; it tells nothing of the secret."""

    completion_id: str | None = None
    """None until the request is accepted."""

    priority_class: str = "none"
    demoted_to: str | None = None
    """The class as which the request is served, if not as its own."""

    lease: Lease | None = None
    """What is to be given back at the end."""

    endpoint_ids: list[str] = field(default_factory=list)
    """Nodes that were tried, over all sequences."""

    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    ttft_s: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    """Code of the error that the client was told."""

    error_type: str = ""
    has_client_left: bool = False
    replay_of: RequestRecord | None = None
    """The earlier request whose answer this one gets, because both have the same key."""

    span: Span | None = None
    """Of the request, where requests are traced."""

    book: StoryBook = field(default_factory=StoryBook)
    """What has become of the request."""

    duration_s: float | None = None
    """From arrival to end; None while it goes on."""

    gain_captured: float = 0.0
    gain_possible: float = 0.0
    """Both as in the metrics of these names, over all sequences."""

    num_holders: int = 1
    """Who still works on the request: at first its HTTP exchange alone."""

    ending: tuple[str, int] = ("unknown", CLIENT_LEFT_STATUS)
    """Route and status of the HTTP exchange, when it has ended."""

    def identify(self, client: Client, key_id: str | None) -> None:
        """The sender is known."""
        self.client = client
        self.key_id = key_id

    def accept(self, completion_id: str, plan: GenerationPlan, lease: Lease) -> None:
        """The request is valid and let in, and begins."""
        self.completion_id = completion_id
        self.priority_class = plan.priority_class.name
        self.demoted_to = plan.demoted_to.name if plan.demoted_to else None
        self.num_prompt_tokens = plan.num_prompt_tokens
        self.lease = lease
        self._class_metrics.in_progress.inc()
        self.book.note(
            "accepted",
            priority_class=self.priority_class,
            demoted_to=self.demoted_to,
            client=self._client_name or None,
            num_prompt_tokens=plan.num_prompt_tokens,
            num_sequences=len(plan.sequences),
        )
        if self.span is not None:
            self.span.note(_plan_attributes(plan))

    def fail(self, answer: ErrorAnswer) -> None:
        """The client is told of an error."""
        self.error = answer.error.code or answer.error.type
        self.error_type = answer.error.type

    def receive(self, num_new_tokens: int, now_s: float, finish_reason: str | None) -> None:
        """Tokens came from a node."""
        if self.ttft_s is None and num_new_tokens > 0:
            self.ttft_s = now_s - self.arrival_s
            self.book.note("first_token")
        self.num_completion_tokens += num_new_tokens
        if finish_reason is not None:
            self.finish_reasons.append(finish_reason)

    def answer_headers(self, now_s: float) -> Iterator[tuple[str, str]]:
        """Yield the headers that this request's answer gets if it begins now."""
        yield REQUEST_ID_HEADER.lower(), self.request_id
        if self.client is not None:
            yield from self.client.limiter.headers(now_s)
        served = self.replay_of or self
        if served.completion_id is not None:
            yield SERVED_AS_HEADER.lower(), served.demoted_to or served.priority_class

    def hold(self) -> None:
        """The answer is made apart from the HTTP exchange; what it holds stays until `release`."""
        self.num_holders += 1

    def close(self, route: str, status: int, now_s: float) -> None:
        """The HTTP exchange has ended."""
        self.ending = (route, status)
        if self.completion_id is not None and self.has_client_left:
            self._class_metrics.disconnects.inc()
        self.release(now_s)

    def release(self, now_s: float) -> None:
        """One holder is done; with the last, give back what the request held, count it, and log it
        if it was a generation or refused."""
        self.num_holders -= 1
        if self.num_holders > 0:
            return
        route, status = self.ending
        if self.lease is not None:
            num_tokens = self.num_prompt_tokens + self.num_completion_tokens
            # What ends as our failure is not held against the client.
            self.lease.close(num_used_tokens=0 if status >= 500 else num_tokens)
        self._count(route, str(status))
        if status in REFUSED_STATUSES:
            self.metrics.refusals(self._client_name, self.error, self.error_type).inc()
        if self.span is not None:
            self._end_span(self.span, route, status)
        self.duration_s = duration_s = now_s - self.arrival_s
        if self.completion_id is not None:
            self.book.note(
                "ended",
                status=status,
                num_completion_tokens=self.num_completion_tokens,
                finish_reasons=", ".join(self.finish_reasons) or None,
                error=self.error,
                has_client_left=self.has_client_left or None,
            )
            self._class_metrics.in_progress.dec()
            self._class_metrics.duration.observe(duration_s)
        is_of_interest = self.error is not None or self.has_client_left or self.replay_of
        if self.completion_id is None and not is_of_interest:
            return  # Health checks and scrapes would drown the rest.
        _log.info(
            "request",
            request_id=self.request_id,
            route=route,
            status=status,
            completion_id=self.completion_id,
            client_id=self._client_name or None,
            key_id=self.key_id,
            priority_class=self.priority_class,
            demoted_to=self.demoted_to,
            endpoint_ids=self.endpoint_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            num_completion_tokens=self.num_completion_tokens,
            ttft_s=self.ttft_s,
            duration_s=duration_s,
            gain_captured=self.gain_captured,
            gain_possible=self.gain_possible,
            finish_reasons=self.finish_reasons,
            error=self.error,
            has_client_left=self.has_client_left,
            replay_of=self.replay_of and self.replay_of.completion_id,
            trace_id=self.span and self.span.trace_id,
        )

    @property
    def client_metrics(self) -> ClientMetrics | None:
        """The metrics of the client, if it is one of the clients file."""
        return self.metrics.of_client(self._client_name) if self._client_name else None

    def _end_span(self, span: Span, route: str, status: int) -> None:
        replay_of = None if self.replay_of is None else self.replay_of.completion_id
        span.note(
            {
                "http.route": route,
                "http.response.status_code": status,
                "gen_ai.response.id": self.completion_id,
                "gen_ai.response.finish_reasons": self.finish_reasons or None,
                "gen_ai.response.time_to_first_chunk": self.ttft_s,
                "gen_ai.usage.input_tokens": self.num_prompt_tokens,
                "gen_ai.usage.output_tokens": self.num_completion_tokens,
                "proserve.client_id": self._client_name or None,
                "proserve.demoted_to": self.demoted_to,
                "proserve.gain.captured": self.gain_captured,
                "proserve.gain.possible": self.gain_possible,
                "proserve.has_client_left": self.has_client_left,
                "proserve.replay_of": replay_of,
            }
        )
        span.end(self.error)

    def _count(self, route: str, status: str) -> None:
        self.metrics.requests(route, self.priority_class, status).inc()
        if self._client_name:
            self.metrics.client_requests(self._client_name, self.priority_class, status).inc()

    @property
    def _client_name(self) -> str:
        return (self.client and self.client.name) or ""

    @property
    def _class_metrics(self) -> ClassMetrics:
        return self.metrics.of_class(self.priority_class)


def request_span(tracing: Tracing, request: Request, request_id: str) -> Span:
    """Return the span of a request for a generation, in the trace that its sender has begun."""
    is_chat = request.url.path.endswith("/chat/completions")
    operation = "chat" if is_chat else "text_completion"
    return tracing.begin(
        operation,
        request.headers.getlist(TRACEPARENT),
        {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "proserve",
            "proserve.request_id": request_id,
        },
    )


def _finite(objective_s: float) -> float | None:
    return objective_s if math.isfinite(objective_s) else None


def _plan_attributes(plan: GenerationPlan) -> Attributes:
    sampling = plan.sequences[0].sampling
    return {
        "gen_ai.request.model": plan.model,
        "gen_ai.request.choice.count": len(plan.sequences),
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.stream": plan.is_stream,
        "proserve.priority_class": plan.priority_class.name,
        "proserve.weight": plan.priority_class.weight,
        "proserve.slo.ttft_s": _finite(plan.slo.ttft_s),
        "proserve.slo.tpot_s": _finite(plan.slo.tpot_s),
    }


class AccessLog:
    """Gives each request a record and its id, and closes the record at the end."""

    def __init__(self, app: ASGIApp, *, clock: Clock, metrics: RouterMetrics) -> None:
        self._app = app
        self._clock = clock
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        is_usable = _SANE_REQUEST_ID.fullmatch(asked) and redacted(asked) == asked
        request_id = asked if is_usable else f"req-{uuid.uuid4().hex}"
        record = RequestRecord(request_id, self._clock.now_s(), self._metrics)
        scope.setdefault("state", {})["record"] = record
        status = CLIENT_LEFT_STATUS

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    *(
                        (name.encode(), value.encode())
                        for name, value in record.answer_headers(self._clock.now_s())
                    ),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            status, record.error = 500, "internal_error"
            raise
        finally:
            route = scope.get("route")
            record.close(getattr(route, "path", "unknown"), status, self._clock.now_s())
