"""Request ids, one log line and the counters of each request, whatever becomes of it.

A plain ASGI class: a middleware made with FastAPI's decorator doubles the cost of a stream.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.core.ports import Clock
from router.metrics import ClassMetrics, RouterMetrics

REQUEST_ID_HEADER = "X-Request-Id"
CLIENT_LEFT_STATUS = 499
"""Counted for clients that left before their answer began; nginx's number."""

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_log = structlog.get_logger("router")


@dataclass(slots=True)
class RequestRecord:
    """What is noted about one HTTP request while it is served."""

    request_id: str
    arrival_s: float
    metrics: RouterMetrics
    completion_id: str | None = None
    """None until the request is accepted."""

    priority_class: str = "none"
    endpoint_ids: list[str] = field(default_factory=list)
    """Nodes that were tried, over all sequences."""

    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    ttft_s: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    """Code of the error that the client was told."""

    has_client_left: bool = False

    def accept(self, completion_id: str, priority_class: str, num_prompt_tokens: int) -> None:
        """The request is valid and begins."""
        self.completion_id = completion_id
        self.priority_class = priority_class
        self.num_prompt_tokens = num_prompt_tokens
        self._class_metrics.in_progress.inc()

    def receive(self, num_new_tokens: int, now_s: float, finish_reason: str | None) -> None:
        """Tokens came from a node."""
        if self.ttft_s is None and num_new_tokens > 0:
            self.ttft_s = now_s - self.arrival_s
        self.num_completion_tokens += num_new_tokens
        if finish_reason is not None:
            self.finish_reasons.append(finish_reason)

    def close(self, route: str, status: int, now_s: float) -> None:
        """The answer has ended: count it, and log it if it was a generation or refused."""
        self.metrics.requests(route, self.priority_class, str(status)).inc()
        duration_s = now_s - self.arrival_s
        if self.completion_id is not None:
            self._class_metrics.in_progress.dec()
            self._class_metrics.duration.observe(duration_s)
            if self.has_client_left:
                self._class_metrics.disconnects.inc()
        if self.completion_id is None and self.error is None and not self.has_client_left:
            return  # Health checks and scrapes would drown the rest.
        _log.info(
            "request",
            request_id=self.request_id,
            route=route,
            status=status,
            completion_id=self.completion_id,
            priority_class=self.priority_class,
            endpoint_ids=self.endpoint_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            num_completion_tokens=self.num_completion_tokens,
            ttft_s=self.ttft_s,
            duration_s=duration_s,
            finish_reasons=self.finish_reasons,
            error=self.error,
            has_client_left=self.has_client_left,
        )

    @property
    def _class_metrics(self) -> ClassMetrics:
        return self.metrics.of_class(self.priority_class)


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
        request_id = asked if _SANE_REQUEST_ID.fullmatch(asked) else f"req-{uuid.uuid4().hex}"
        id_header = (REQUEST_ID_HEADER.lower().encode(), request_id.encode())
        record = RequestRecord(request_id, self._clock.now_s(), self._metrics)
        scope.setdefault("state", {})["record"] = record
        status = CLIENT_LEFT_STATUS

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            status, record.error = 500, "internal_error"
            raise
        finally:
            route = scope.get("route")
            record.close(getattr(route, "path", "unknown"), status, self._clock.now_s())
