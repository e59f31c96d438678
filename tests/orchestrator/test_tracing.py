from __future__ import annotations

import subprocess
import sys

import pytest

from orchestrator.core.errors import ConfigError
from orchestrator.tracing import Tracing, TracingConfig, tracing_of
from tests.tracers import NOT_SAMPLED, SAMPLED, SPAN_ID, TRACE_ID, Tracer, attributes, ids

CONFIG = TracingConfig(endpoint="http://127.0.0.1:4318")


@pytest.mark.parametrize(
    ("sample_fraction", "traceparents", "num_spans"),
    [
        (1.0, (), 1),
        (0.0, (), 0),
        (0.0, (SAMPLED,), 1),
        (1.0, (NOT_SAMPLED,), 0),
        (0.0, (SAMPLED, SAMPLED), 0),
        (0.0, ("00-nonsense",), 0),
    ],
)
def test_the_sender_decides_or_else_chance_whether_there_are_spans(
    sample_fraction: float, traceparents: tuple[str, ...], num_spans: int
) -> None:
    tracer = Tracer(sample_fraction=sample_fraction)

    span = tracer.tracing.begin("chat", traceparents, {})
    span.end()

    assert len(tracer.spans()) == num_spans
    assert span.is_sampled is False, "it has ended"


def test_a_part_in_another_process_belongs_to_the_same_trace() -> None:
    tracer = Tracer()
    span = tracer.tracing.begin("chat", [SAMPLED], {"a": 1, "b": None})
    child = span.child("dispatch", {})
    header = child.traceparent
    child.end()
    span.end("node_unavailable")

    inner, outer = tracer.spans()

    assert (ids(outer)[0], ids(outer)[2]) == (TRACE_ID, SPAN_ID)
    assert ids(inner)[2] == ids(outer)[1]
    assert header == f"00-{TRACE_ID}-{ids(inner)[1]}-01"
    assert attributes(outer) == {"a": 1, "error.type": "node_unavailable"}
    assert not outer.status.is_ok
    assert inner.status.description is None


def test_what_is_not_sampled_here_is_not_sampled_later() -> None:
    span = Tracer(sample_fraction=0.0).tracing.begin("chat", (), {})

    for part in (span, span.child("dispatch", {})):
        flags = int(part.traceparent.rpartition("-")[2], 16)
        assert flags & 1 == 0


def test_spans_go_to_the_collector_in_the_background() -> None:
    """Nobody listens there; nothing is sent, since there is nothing to send."""
    tracing = tracing_of(CONFIG, service_name="test")

    assert isinstance(tracing, Tracing)
    tracing.close()


def test_no_section_no_tracing() -> None:
    assert tracing_of(None, service_name="test") is None


def test_nothing_is_imported_while_tracing_is_off() -> None:
    """Nor is the API, but for what the framework brings along."""
    code = (
        "import sys, fastapi; before = set(sys.modules);"
        "import router.app, orchestrator.node_api;"
        "print([m for m in set(sys.modules) - before if m.startswith('opentelemetry')])"
    )

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)

    assert answer.stdout.strip() == b"[]"


def test_without_the_packages_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)

    with pytest.raises(ConfigError, match=r"not installed: pip install 'proserve\[otel\]'"):
        Tracing(CONFIG, service_name="test")
