"""What operators see: metrics and log lines."""

from __future__ import annotations

import pytest
import structlog
from structlog.typing import EventDict

from orchestrator.core.slo import Slo
from orchestrator.wire import TokenEvent
from router.generation import SequenceMeter
from router.metrics import RouterMetrics
from router.responses import ServingSummary
from router.tokenizer import Tokenizer
from tests.router.conftest import RunningRouter
from tests.router.fake_node import Drop, FakeNode, saying


def value_of(metrics: RouterMetrics, name: str) -> float:
    (line,) = [
        line
        for line in metrics.render({}, num_waiting=0).decode().splitlines()
        if line.startswith(f'{name}{{priority_class="high"}}')
    ]
    return float(line.rsplit(" ", 1)[1])


def test_gain_is_earned_by_each_token_before_its_deadline() -> None:
    """Arrival at 10 s, first token due at 11 s, then one each 0.5 s: 11, 11.5, 12, 12.5.

    Tokens come at 10.9 (in time), 11.6 (late), 11.9 (in time) and 12.5 (late, being no sooner).
    """
    metrics = RouterMetrics()
    meter = SequenceMeter(
        metrics.of_class("high"), Slo(ttft_s=1.0, tpot_s=0.5), weight=4.0, arrival_s=10.0
    )

    for now_s in (10.9, 11.6, 11.9, 12.5):
        meter.receive(1, now_s)
    meter.close()

    assert value_of(metrics, "proserve_router_service_gain_captured_total") == 8.0
    assert value_of(metrics, "proserve_router_service_gain_possible_total") == 16.0
    assert value_of(metrics, "proserve_router_completion_tokens_total") == 4
    assert value_of(metrics, "proserve_router_time_to_first_token_seconds_count") == 1
    assert value_of(metrics, "proserve_router_time_to_first_token_seconds_sum") == pytest.approx(
        0.9
    )
    assert value_of(metrics, "proserve_router_inter_token_seconds_count") == 3
    assert value_of(metrics, "proserve_router_inter_token_seconds_sum") == pytest.approx(1.6)


def test_a_summary_says_what_became_of_the_promise() -> None:
    """Due at 11, 11.5, 12 and 12.5; the third token is late. The three after the first take 1.4 s
    together, 466.667 ms each, so that both objectives are met."""
    meter = SequenceMeter(
        RouterMetrics().of_class("high"), Slo(ttft_s=1.0, tpot_s=0.5), weight=4.0, arrival_s=10.0
    )
    for now_s in (10.9, 11.4, 12.1, 12.3):
        meter.receive(1, now_s)

    assert meter.summary(1, ["node-0", "node-2"]) == ServingSummary(
        index=1,
        tokens=4,
        tokens_on_time=3,
        ttft_ms=900.0,
        mean_tpot_ms=466.667,
        objectives_met=True,
        service_gain=12.0,
        possible_service_gain=16.0,
        node="node-2",
        retries=1,
    )


@pytest.mark.parametrize(
    ("token_times_s", "has_met"),
    [
        ((), False),
        ((0.9,), True),
        ((1.0,), False),
        ((0.9, 1.3), True),
        ((0.9, 1.5), False),
        ((0.2, 0.8), False),
    ],
)
def test_objectives_are_met_by_the_first_token_and_the_mean_of_the_others(
    token_times_s: tuple[float, ...], *, has_met: bool
) -> None:
    """The same as in `orchestrator.core.gain`: strictly below 1 s, and 0.5 s on average."""
    meter = SequenceMeter(
        RouterMetrics().of_class("high"), Slo(ttft_s=1.0, tpot_s=0.5), weight=1.0, arrival_s=0.0
    )
    for now_s in token_times_s:
        meter.receive(1, now_s)

    assert meter.summary(0, ["node-0"]).objectives_met is has_met


def test_a_sequence_without_a_token_has_missed_its_first_ones_gain() -> None:
    metrics = RouterMetrics()
    meter = SequenceMeter(metrics.of_class("high"), Slo(), weight=4.0, arrival_s=0.0)

    meter.close()

    assert value_of(metrics, "proserve_router_service_gain_captured_total") == 0.0
    assert value_of(metrics, "proserve_router_service_gain_possible_total") == 4.0


def test_requests_are_counted_by_route_class_and_status(router: RunningRouter) -> None:
    router.chat(priority="high")
    router.complete()
    router.complete(n=0)
    router.http.get("/nowhere/1")
    router.http.get("/nowhere/2")

    requests = 'proserve_router_requests_total{priority_class="%s",route="%s",status="%s"}'
    assert router.metric(requests % ("high", "/v1/chat/completions", 200)) == 1
    assert router.metric(requests % ("normal", "/v1/completions", 200)) == 1
    assert router.metric(requests % ("none", "/v1/completions", 400)) == 1
    assert router.metric(requests % ("none", "unknown", 404)) == 2
    assert router.metric('proserve_router_request_seconds_count{priority_class="high"}') == 1
    assert router.metric('proserve_router_requests_in_progress{priority_class="high"}') == 0
    assert router.metric('proserve_router_endpoint_usable{endpoint_id="node-0"}') == 1


def test_tokens_are_counted_by_class(router: RunningRouter, node: FakeNode) -> None:
    node.script = saying([70, 71, 72])

    router.complete(prompt=[5, 6], priority="low", n=2)

    assert router.metric('proserve_router_prompt_tokens_total{priority_class="low"}') == 2
    assert router.metric('proserve_router_completion_tokens_total{priority_class="low"}') == 6
    assert router.metric('proserve_router_service_gain_captured_total{priority_class="low"}') == 6


def logged(router: RunningRouter, **changes: object) -> EventDict:
    """Return the one line on requests that a completion with these changes logs."""
    with structlog.testing.capture_logs() as lines:
        router.complete(**changes)
        # The line is written after the answer; the next answer on the connection comes later.
        router.http.get("/v1/models")
    (line,) = [line for line in lines if line["event"] == "request"]
    return line


def test_a_request_logs_one_line_without_its_text(
    router: RunningRouter, node: FakeNode, tokenizer: Tokenizer
) -> None:
    node.script = saying(tokenizer.encode("Hello", add_special_tokens=False))
    router.http.headers["X-Request-Id"] = "job-1"

    line = logged(router, prompt="a secret", priority="high", user="me")

    assert line["event"] == "request"
    assert line["request_id"] == "job-1"
    assert line["completion_id"].startswith("cmpl-")
    assert line["priority_class"] == "high"
    assert line["endpoint_ids"] == ["node-0"]
    assert line["status"] == 200
    assert line["num_prompt_tokens"] == len(node.requests[0].prompt_token_ids)
    assert line["num_completion_tokens"] == 1
    assert 0 < line["ttft_s"] <= line["duration_s"]
    assert line["finish_reasons"] == ["stop"]
    assert "secret" not in str(line)
    assert "Hello" not in str(line)


def test_a_refusal_logs_its_code_and_not_its_text(router: RunningRouter) -> None:
    line = logged(router, prompt={"a": "secret"})

    assert (line["status"], line["error"]) == (400, "invalid_type")
    assert "secret" not in str(line)


def test_a_broken_stream_logs_its_error(router: RunningRouter, node: FakeNode) -> None:
    node.script = lambda _: [TokenEvent((70,)), Drop()]

    line = logged(router, stream=True)

    assert (line["status"], line["error"]) == (200, "node_unavailable")
    assert line["num_completion_tokens"] == 1
