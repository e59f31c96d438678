"""What users of other servers complain about does not happen here.

| complaint | test |
|---|---|
| a waiting request of a high class cannot displace a running low one at the sequence limit | `tests/router/test_complaints.py::test_a_waiting_high_request_displaces_running_low_ones_at_the_sequence_limit` |
| strict classes starve the lowest one | `tests/router/test_complaints.py::test_the_lowest_class_waits_no_longer_than_its_quota_takes`, `tests/orchestrator/core/test_slide_batching.py::test_starved_requests_take_no_more_than_their_share` |
| nobody knows which priority wins, and a wrong one does nothing | `tests/router/test_complaints.py::test_what_is_no_class_is_refused`, `tests/router/test_terms.py::test_classes_are_listed_from_the_most_valuable_however_they_are_configured` |
| priority gets lost between router and engine | `tests/router/test_complaints.py::test_a_priority_can_be_followed_to_the_node_and_seen_in_both_metrics` |
| a worker marked as overloaded or failed stays so | `tests/router/test_health.py::test_whatever_happens_the_mark_always_clears`, `tests/router/test_admission.py::test_places_are_kept_for_the_more_valuable_and_the_mark_clears` |
| the count of what a worker has is never given back | `tests/router/test_raw_http.py::test_whatever_comes_there_is_an_answer_or_an_end_and_nothing_stays` |
| a retry hits the dead worker again | `tests/router/test_failover.py::test_a_failed_node_is_not_tried_again`, `tests/router/test_resume.py::test_a_sequence_never_returns_to_the_process_that_failed_on_it` |
| an error does not tell overload from no worker, nor when to come again | `tests/router/test_complaints.py::test_too_busy_and_nobody_there_are_told_apart` |
| there is no deadline for one request, or it changes nothing | `tests/router/test_complaints.py::test_the_deadline_of_one_request_decides_who_goes_first` |
| batching of the stream delays the first token | `tests/router/test_speed_guards.py::test_headers_and_first_token_come_in_one_segment`, `tests/router/test_streaming.py::test_every_token_is_sent_before_the_next_one_is_made` |
"""

# ruff: noqa: E501 - a table's row is one line

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.core.slide_batching import SlideBatchingOptions, SlideBatchingScheduler
from router.app import create_app
from router.config import EndpointConfig, RouterConfig
from router.tokenizer import Tokenizer
from tests.factories import make_capabilities, make_request, make_scheduler, run_step
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode, Stall
from tests.router.servers import http_post
from tests.running_node import running_node

ROOT = Path(__file__).parents[2]


def test_every_complaint_has_its_tests() -> None:
    assert __doc__ is not None
    named = re.findall(r"`(tests/\S+)::(\w+)`", __doc__)

    assert len(named) > 10
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"


def run_until_idle(scheduler: SlideBatchingScheduler, now_s: float = 0.0) -> dict[str, list[float]]:
    """Return when each request got its tokens from now on, if none is ever preempted."""
    token_times_s: dict[str, list[float]] = defaultdict(list)
    while scheduler.has_requests:
        plan, now_s = run_step(scheduler, now_s)
        for part in plan.scheduled:
            if part.num_computed_tokens + part.num_new_tokens >= part.request.num_prompt_tokens:
                token_times_s[part.request_id].append(now_s)
    return token_times_s


@pytest.mark.parametrize("low_tpot_s", [0.5, 0.02])
def test_a_waiting_high_request_displaces_running_low_ones_at_the_sequence_limit(
    low_tpot_s: float,
) -> None:
    """A step holds two sequences and takes 12 ms, or 30 with two prompts of 10 tokens. Two low ones
    run, with much slack or with some, and would for 2.4 s; the high ones are due in 50 ms. (Only
    running ones whose very next token would be late keep their places, as in the paper.)"""
    scheduler = make_scheduler(
        *(
            make_request(f"low{i}", weight=1.0, ttft_s=1.0, tpot_s=low_tpot_s, max_tokens=200)
            for i in range(2)
        ),
        capabilities=make_capabilities(max_num_seqs=2),
    )
    now_s = 0.0
    for _ in range(5):
        plan, now_s = run_step(scheduler, now_s)
        assert {part.request_id for part in plan.scheduled} == {"low0", "low1"}
    for i in range(2):
        scheduler.add_request(
            make_request(f"high{i}", weight=4.0, ttft_s=0.05, max_tokens=20, arrival_s=now_s)
        )

    token_times_s = run_until_idle(scheduler, now_s)

    for i in range(2):
        assert token_times_s[f"high{i}"][0] < now_s + 0.05
        assert len(token_times_s[f"high{i}"]) == 20
        assert 5 + len(token_times_s[f"low{i}"]) == 200, "displaced is not lost"


def test_the_lowest_class_waits_no_longer_than_its_quota_takes() -> None:
    """High prompts fill every step for ever. A low one of 100 tokens is due after 0.1 s and starved
    when it is overdue by as much. A tenth of all time is for the starved, so its 100 ms of work
    are done within a second, give or take a step (0.4 s) and a chunk (0.1 s)."""
    low = make_request("low", num_prompt_tokens=100, ttft_s=0.1, weight=0.001, max_tokens=1)
    scheduler = make_scheduler(
        low, options=SlideBatchingOptions(min_chunk_tokens=0, starvation_quota=0.1)
    )
    now_s, num_high, served_s = 0.0, 0, None
    while served_s is None and now_s < 10.0:
        for _ in range(2):
            scheduler.add_request(
                make_request(
                    f"high{num_high}",
                    num_prompt_tokens=400,
                    ttft_s=1.0,
                    weight=10.0,
                    arrival_s=now_s,
                    max_tokens=1,
                )
            )
            num_high += 1
        _, now_s = run_step(scheduler, now_s)
        if low.num_output_tokens > 0:
            served_s = now_s

    assert served_s is not None
    assert 0.2 < served_s < 0.2 + 0.1 / 0.1 + 0.4 + 0.1


@pytest.mark.parametrize(
    ("asked", "headers"),
    [
        *(({"priority": value}, {}) for value in (0, 1, -1, 0.5, True, "1", "vip", "HIGH", "")),
        *(({}, {"X-ProServe-Priority": value}) for value in ("0", "1", "-1", "vip", "High", "")),
        ({"service_tier": "priority"}, {}),
        ({"nice": 5}, {}),
    ],
)
def test_what_is_no_class_is_refused(
    quiet_router: RunningRouter, asked: dict[str, Any], headers: dict[str, str]
) -> None:
    response = quiet_router.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "Hi", **asked}, headers=headers
    )

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] in {"priority", "X-ProServe-Priority", "service_tier", "nice"}
    if isinstance(next(iter((asked | headers).values())), str) and error["param"] != "service_tier":
        assert "high, normal, low" in error["message"], "the most valuable first"


async def test_a_priority_can_be_followed_to_the_node_and_seen_in_both_metrics(
    engine_dir: Path, tokenizer: Tokenizer
) -> None:
    async with running_node(sys.executable, "-m", "tests.scripted_engine") as node:
        config = RouterConfig(
            engine_dir=engine_dir,
            model="scripted",
            nodes=(EndpointConfig(endpoint_id="node-t", url=str(node.client.base_url)),),
        )
        app = create_app(config, tokenizer=tokenizer)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://router") as client,
        ):
            answer = await client.post(
                "/v1/completions",
                json={"model": "scripted", "prompt": "Hi", "priority": "high", "max_tokens": 3},
            )
            metrics = (await client.get("/metrics")).text

        assert answer.status_code == 200, answer.text
        assert answer.headers["x-proserve-served-as"] == "high"
        ended = 'proserve_node_class_requests_total{finish_reason="length",priority_class="high"}'
        assert await node.metric(ended) == 1
    answered = 'priority_class="high",route="/v1/completions",status="200"'
    assert f"proserve_router_requests_total{{{answered}}} 1.0" in metrics
    assert 'service_gain_captured_total{priority_class="high"}' in metrics


def test_too_busy_and_nobody_there_are_told_apart(
    start_router: RouterFactory, node: FakeNode
) -> None:
    node.script = lambda _: [Stall()]
    with (
        start_router(
            [(node.endpoint_id, node.url)], admission={"max_waiting_sequences": 1}
        ) as router,
        router.connect() as connection,
    ):
        connection.sendall(http_post("/v1/completions", {"model": "tiny", "prompt": "Hi"}))
        node.wait_until(lambda n: len(n.requests) == 1, "the only place is taken")
        busy = router.complete()
    node.is_draining = True
    with start_router([(node.endpoint_id, node.url)]) as router:
        nobody = router.complete()

    assert (busy.status_code, nobody.status_code) == (429, 503)
    assert busy.json()["error"]["code"] == "queue_full"
    assert "wait" in busy.json()["error"]["message"]
    assert nobody.json()["error"]["code"] == "node_unavailable"
    assert "node-0: draining" in nobody.json()["error"]["message"]
    assert int(busy.headers["retry-after"]) >= 1
    assert int(nobody.headers["retry-after"]) >= 1


def test_the_deadline_of_one_request_decides_who_goes_first(
    router: RunningRouter, node: FakeNode
) -> None:
    """What the node is told of two requests of one class, the later with the shorter objective."""
    router.complete(priority="low")
    router.complete(priority="low", slo={"ttft_ms": 300})
    told = [
        make_request(
            f"r{i}", weight=request.weight, ttft_s=request.ttft_s or 0.0, num_prompt_tokens=100
        )
        for i, request in enumerate(node.requests)
    ]
    scheduler = make_scheduler(*told, capabilities=make_capabilities(max_num_seqs=1))

    plan, _ = run_step(scheduler, 0.0)

    assert [part.request_id for part in plan.scheduled] == ["r1"]
