"""Spans of requests for OpenTelemetry, from router to node.

OpenTelemetry's SDK is not imported before tracing is switched on, and a request without a span
costs a comparison with None. Spans say how long what took, never what a prompt or an answer says.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.core.errors import ConfigError
from orchestrator.peers import ServiceUrl

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import SpanProcessor

TRACEPARENT = "traceparent"
"""Header of W3C Trace Context, by which a trace goes on in the next process."""

SEND_TIMEOUT_S = 3
"""After this long, retries included, spans are given up; also by a process that wants to end."""

Attributes = Mapping[str, str | int | float | bool | Sequence[str] | None]
"""Those that are None are left out."""

_NS = 1_000_000_000


class TracingConfig(BaseModel):
    """Where spans of requests are sent, and of how many. Needs the extra `otel`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    endpoint: ServiceUrl
    """A collector that takes OTLP over HTTP, such as http://127.0.0.1:4318; spans go to its
    /v1/traces. Headers that it wants are read from the environment variable
    `OTEL_EXPORTER_OTLP_HEADERS`."""

    sample_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the requests with spans, chosen by chance. One that comes with a trace of its
    sender (`traceparent`) follows the sender's choice instead."""


class Span:
    """One piece of work on a request, from when it is made until `end`."""

    __slots__ = ("_span", "_tracing")

    def __init__(self, tracing: Tracing, span: trace.Span) -> None:
        self._tracing = tracing
        self._span = span

    @property
    def is_sampled(self) -> bool:
        """Whether anybody will see it."""
        return self._span.is_recording()

    @property
    def trace_id(self) -> str:
        """Return what all spans of the request have in common, as collectors write it."""
        return f"{self._span.get_span_context().trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """Return the header with which the next process begins its part."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def child(self, name: str, attributes: Attributes) -> Span:
        """Return a new span for a part of this one's work that another process does."""
        return self._tracing.child(name, self._span, attributes)

    def note(self, attributes: Attributes) -> None:
        """Add attributes."""
        self._span.set_attributes(_known(attributes))

    def event(self, name: str, attributes: Attributes | None = None, *, ago_s: float = 0.0) -> None:
        """Something has happened, now or a moment ago."""
        if self.is_sampled:
            at_ns = time.time_ns() - int(ago_s * _NS)
            self._span.add_event(name, _known(attributes or {}), at_ns)

    def end(self, error: str | None = None) -> None:
        """The work has ended; `error` is a short code or None. Nothing is added any more."""
        self._tracing.end(self._span, error)


class Tracing:
    """Makes spans and sends them to a collector."""

    def __init__(
        self,
        config: TracingConfig,
        *,
        service_name: str,
        processor: SpanProcessor | None = None,
    ) -> None:
        """`processor` takes the spans that have ended, in place of one that sends them in the
        background.

        Raises:
            ConfigError: the packages of the extra `otel` are not installed.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.sdk import resources
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise _not_installed(error) from error
        self._trace = trace
        # A provider of our own: a process-wide one would be somebody else's to choose.
        self._provider = TracerProvider(
            resource=resources.Resource.create({"service.name": service_name}),
            sampler=ParentBased(TraceIdRatioBased(config.sample_fraction)),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor or _sender(config))
        self._tracer = self._provider.get_tracer("proserve")

    def begin(self, name: str, traceparents: Sequence[str], attributes: Attributes) -> Span:
        """Return the span of a request that has just come, in the trace that its header names."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # More than one is as good as none, says the standard.
        carrier = {TRACEPARENT: traceparents[0]} if len(traceparents) == 1 else {}
        context = TraceContextTextMapPropagator().extract(carrier)
        kind = self._trace.SpanKind.SERVER
        span = self._tracer.start_span(name, context, kind, _known(attributes))
        return Span(self, span)

    def child(self, name: str, parent: trace.Span, attributes: Attributes) -> Span:
        """Return a span below `parent`, for a call to another process."""
        context = self._trace.set_span_in_context(parent)
        kind = self._trace.SpanKind.CLIENT
        return Span(self, self._tracer.start_span(name, context, kind, _known(attributes)))

    def end(self, span: trace.Span, error: str | None) -> None:
        """End a span."""
        if error is not None and span.is_recording():
            span.set_attribute("error.type", error)
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what is left; blocks, for `SEND_TIMEOUT_S` if the collector does not answer."""
        self._provider.shutdown()


def tracing_of(config: TracingConfig | None, *, service_name: str) -> Tracing | None:
    """Return what makes the spans of a service; None if there are to be none.

    Raises:
        ConfigError: as `Tracing`.
    """
    return None if config is None else Tracing(config, service_name=service_name)


def _known(attributes: Attributes) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _sender(config: TracingConfig) -> SpanProcessor:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise _not_installed(error) from error
    exporter = OTLPSpanExporter(endpoint=f"{config.endpoint}/v1/traces", timeout=SEND_TIMEOUT_S)
    return BatchSpanProcessor(exporter)


def _not_installed(error: ImportError) -> ConfigError:
    return ConfigError(
        f"tracing is on, but {error.name} is not installed: pip install 'proserve[otel]', or take "
        "the section tracing out"
    )
