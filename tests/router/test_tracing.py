"""The router's spans: one for each request, and one for each node that a sequence was sent to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan

from orchestrator.wire import TokenEvent
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import Drop, FakeNode, Refuse, saying
from tests.tracers import SAMPLED, SPAN_ID, TRACE_ID, Tracer, attributes, ids

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tracer() -> Tracer:
    return Tracer()


@pytest.fixture
def other() -> Iterator[FakeNode]:
    fake = FakeNode("node-1")
    with fake.serve() as server:
        fake.url = server.url
        yield fake


@pytest.fixture
def traced(
    node: FakeNode, other: FakeNode, start_router: RouterFactory, tracer: Tracer
) -> Iterator[RunningRouter]:
    nodes = [(n.endpoint_id, n.url) for n in (node, other)]
    with start_router(nodes, tracer=tracer.tracing, policy="round-robin") as router:
        yield router


def spans_of(tracer: Tracer, router: RunningRouter) -> list[ReadableSpan]:
    """Return all spans; that of a request ends after its answer, before the next answer."""
    router.http.get("/v1/models")
    return tracer.spans()


def test_a_request_and_its_node_have_spans_in_the_trace_of_the_sender(
    traced: RunningRouter, tracer: Tracer, node: FakeNode
) -> None:
    node.script = saying([70, 71, 72])
    body = {"model": "tiny", "prompt": "Hi", "priority": "high", "temperature": 0.5, "stream": True}
    headers = {"traceparent": SAMPLED, "x-request-id": "job-1"}

    answer = traced.http.post("/v1/completions", json=body, headers=headers)

    dispatch, request = spans_of(tracer, traced)
    assert (ids(request)[0], ids(request)[2]) == (TRACE_ID, SPAN_ID)
    assert ids(dispatch)[2] == ids(request)[1]
    assert node.traceparents == [f"00-{TRACE_ID}-{ids(dispatch)[1]}-01"]
    assert (request.name, dispatch.name) == ("text_completion", "dispatch node-0")
    found = attributes(request)
    assert str(found.pop("gen_ai.response.id")) in answer.text
    assert isinstance(found.pop("gen_ai.response.time_to_first_chunk"), float)
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "proserve",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 16,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": len(node.requests[0].prompt_token_ids),
        "gen_ai.usage.output_tokens": 3,
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "proserve.request_id": "job-1",
        "proserve.priority_class": "high",
        "proserve.weight": 4.0,
        "proserve.slo.ttft_s": 1.0,
        "proserve.slo.tpot_s": 0.05,
        "proserve.gain.captured": 12.0,
        "proserve.gain.possible": 12.0,
        "proserve.has_client_left": False,
    }


def test_every_node_that_a_sequence_was_sent_to_has_a_span(
    traced: RunningRouter, tracer: Tracer, node: FakeNode, other: FakeNode
) -> None:
    """The first one dies behind a token, the second one goes on."""
    node.script = lambda _: [TokenEvent((70,)), Drop()]
    other.script = saying([70, 71])

    traced.complete(max_wait_ms=60_000)

    first, second, request = spans_of(tracer, traced)
    assert attributes(first)["error.type"] == "NodeUnavailable"
    assert "error.type" not in attributes(second)
    assert [attributes(s)["proserve.endpoint_id"] for s in (first, second)] == ["node-0", "node-1"]
    assert [attributes(s)["proserve.attempt"] for s in (first, second)] == [1, 2]
    assert attributes(second)["proserve.num_delivered_tokens"] == 1
    assert {ids(s)[2] for s in (first, second)} == {ids(request)[1]}
    assert attributes(request)["gen_ai.usage.output_tokens"] == 2


def test_a_node_that_refuses_has_a_span_with_its_error(
    traced: RunningRouter, tracer: Tracer, node: FakeNode
) -> None:
    node.script = lambda _: [Refuse(400)]

    traced.complete()

    dispatch, _ = spans_of(tracer, traced)
    assert attributes(dispatch)["error.type"] == "RequestRejected"


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/v1/completions", {"model": "none", "prompt": "a secret"}, "model_not_found"),
        ("/v1/chat/completions", {"model": "tiny", "messages": "a secret"}, "invalid_type"),
    ],
)
def test_a_refused_request_has_a_span_with_its_error(
    traced: RunningRouter, tracer: Tracer, path: str, body: object, error: str
) -> None:
    traced.http.post(path, json=body)

    (request,) = spans_of(tracer, traced)

    assert attributes(request)["error.type"] == error
    assert "secret" not in request.to_json()


def test_no_span_has_a_text(
    traced: RunningRouter, tracer: Tracer, node: FakeNode, other: FakeNode
) -> None:
    """Neither of the prompt, nor of the answer, nor of a node that fails."""
    node.script = lambda _: [Refuse(503, "secret trouble")]
    other.script = saying([90, 91, 92])  # no digits of an id

    answer = traced.complete(prompt="a secret", user="secret", stop="secret", max_wait_ms=60_000)

    text = answer.json()["choices"][0]["text"]
    written = "".join(span.to_json() for span in spans_of(tracer, traced))
    assert text == "xyz"
    assert text not in written
    assert "secret" not in written


def test_lines_of_the_log_name_the_trace(
    traced: RunningRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    headers = {"traceparent": SAMPLED}
    traced.http.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"}, headers=headers)
    traced.http.get("/v1/models")

    assert f"trace_id={TRACE_ID}" in capsys.readouterr().out


def test_without_tracing_nothing_is_passed_on(router: RunningRouter, node: FakeNode) -> None:
    answer: httpx.Response = router.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "Hi"}, headers={"traceparent": SAMPLED}
    )

    assert answer.status_code == 200
    assert node.traceparents == [None]


def test_the_page_names_every_attribute_and_no_other() -> None:
    sources = ("router/access.py", "router/dispatch.py", "orchestrator/node_api.py")
    written = "".join((ROOT / source).read_text() for source in sources)
    page = (ROOT / "docs/tracing.md").read_text()

    named = set(re.findall(r"`(proserve\.[a-z_.]+)`", page))

    figures = {"proserve.num_tokens", "proserve.num_blocks"}
    assert named - figures == set(re.findall(r'"(proserve\.[a-z_.]+)"', written))
