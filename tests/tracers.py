"""Tracing for tests: spans stay where a test can look at them."""

from __future__ import annotations

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from orchestrator.tracing import Tracing, TracingConfig

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}-00"


class Tracer:
    """Tracing that keeps the spans that have ended."""

    def __init__(self, *, sample_fraction: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(
            TracingConfig(endpoint="http://127.0.0.1:4318", sample_fraction=sample_fraction),
            service_name="test",
            processor=SimpleSpanProcessor(self._exporter),
        )

    def spans(self) -> list[ReadableSpan]:
        """Return the spans that have ended, in that order."""
        return list(self._exporter.get_finished_spans())


def attributes(span: ReadableSpan) -> dict[str, object]:
    """Return a span's attributes."""
    return dict(span.attributes or {})


def ids(span: ReadableSpan) -> tuple[str, str, str | None]:
    """Return the ids of a span's trace, of itself and of its parent, as headers write them."""
    context, parent = span.get_span_context(), span.parent
    assert context is not None
    return (
        f"{context.trace_id:032x}",
        f"{context.span_id:016x}",
        None if parent is None else f"{parent.span_id:016x}",
    )
