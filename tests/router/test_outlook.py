"""Predictions from a latency profile: 1 ms a token and 10 ms a step of at most 512 tokens."""

from __future__ import annotations

import dataclasses
import math

import pytest

from orchestrator.core.slo import Slo
from orchestrator.wire import NodeDescription
from router.outlook import ProfileOutlook
from router.policy import EndpointView, RoutingRequest
from tests.factories import make_capabilities, make_profile


def description(endpoint_id: str, *, prefill_token_s: float = 0.001) -> NodeDescription:
    return NodeDescription(
        endpoint_id=endpoint_id,
        instance_id="0",
        model="tiny",
        capabilities=make_capabilities(max_num_batched_tokens=512),
        latency_profile=make_profile(prefill_token_s=prefill_token_s),
        manifest_sha256="0" * 64,
    )


def view(endpoint_id: str = "a", *, num_queued: int = 0, num_decoding: int = 0) -> EndpointView:
    return EndpointView(endpoint_id, num_queued, num_decoding, max_sequence_tokens=4096)


def request(num_prompt_tokens: int, *, ttft_s: float) -> RoutingRequest:
    return RoutingRequest(
        "r", num_prompt_tokens, max_tokens=8, weight=1.0, slo=Slo(ttft_s=ttft_s), arrival_s=100.0
    )


def outlook_on(*views: EndpointView) -> ProfileOutlook:
    return ProfileOutlook(lambda _: views, description)


@pytest.mark.parametrize(
    ("num_queued", "num_decoding", "drain_s"),
    [
        (0, 7, 0.0),
        (100, 0, 0.110),  # one step
        (100, 20, 0.130),  # with 20 tokens decoded in it
        (1000, 0, 1.020),  # two steps
        (1000, 20, 1.060),
    ],
)
def test_a_queue_drains_in_steps(num_queued: int, num_decoding: int, drain_s: float) -> None:
    outlook = outlook_on(view(num_queued=num_queued, num_decoding=num_decoding))

    assert outlook.drain_s(100.0) == pytest.approx(drain_s)


BUSY, IDLE = view("busy", num_queued=1000), view("idle", num_queued=100)


def test_the_first_node_to_drain_counts() -> None:
    assert outlook_on(BUSY, IDLE).drain_s(100.0) == pytest.approx(0.110)


def test_a_request_can_gain_while_one_node_computes_it_in_time() -> None:
    """Behind 100 tokens, 200 more end after 310 ms: too late at 300 ms, in time at 320 ms."""
    assert outlook_on(BUSY, IDLE).can_gain(request(200, ttft_s=0.320), 100.0)
    assert not outlook_on(BUSY, IDLE).can_gain(request(200, ttft_s=0.300), 100.0)
    assert not outlook_on(BUSY).can_gain(request(200, ttft_s=0.320), 100.0)


def test_a_node_that_is_too_small_does_not_count() -> None:
    """The idle one takes sequences of 207 tokens; the request may have 200 + 8."""
    small = dataclasses.replace(IDLE, max_sequence_tokens=207)

    assert not outlook_on(BUSY, small).can_gain(request(200, ttft_s=0.320), 100.0)


def test_the_time_already_spent_counts() -> None:
    assert not outlook_on(IDLE).can_gain(request(200, ttft_s=0.320), 100.020)


def test_without_an_objective_a_request_can_always_gain() -> None:
    swamped = view(num_queued=10**9)

    assert outlook_on(swamped).can_gain(request(4000, ttft_s=math.inf), 100.0)


def test_without_a_node_it_is_not_the_load_that_is_in_the_way() -> None:
    assert outlook_on().can_gain(request(200, ttft_s=0.001), 100.0)
    assert outlook_on().drain_s(100.0) == 0.0


def test_each_node_is_judged_by_its_own_profile() -> None:
    """500 tokens at 1 ms each, and at 0.1 ms each, in one step."""
    slow, fast = view("slow", num_queued=500), view("fast", num_queued=500)
    prefill_token_s = {"slow": 0.001, "fast": 0.0001}

    def drain_s(endpoint: EndpointView) -> float:
        outlook = ProfileOutlook(
            lambda _: [endpoint],
            lambda name: description(name, prefill_token_s=prefill_token_s[name]),
        )
        return outlook.drain_s(100.0)

    assert drain_s(slow) == pytest.approx(0.510)
    assert drain_s(fast) == pytest.approx(0.060)
