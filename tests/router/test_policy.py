from __future__ import annotations

import pytest

from orchestrator.core.slo import Slo
from router.policy import EndpointView, LeastLoadPolicy, RoutingRequest

REQUEST = RoutingRequest(
    request_id="r", num_prompt_tokens=10, max_tokens=8, weight=1.0, slo=Slo(), arrival_s=0.0
)


def view(endpoint_id: str, *, num_queued_prompt_tokens: int, num_decoding: int) -> EndpointView:
    return EndpointView(
        endpoint_id=endpoint_id,
        num_queued_prompt_tokens=num_queued_prompt_tokens,
        num_decoding=num_decoding,
        max_sequence_tokens=8192,
    )


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        pytest.param({"a": (100, 0), "b": (20, 0)}, "b", id="fewer queued prompt tokens"),
        pytest.param({"a": (0, 9), "b": (0, 3)}, "b", id="fewer decoding requests"),
        pytest.param({"a": (10, 5), "b": (0, 16)}, "a", id="both count: 15 < 16"),
        pytest.param({"b": (4, 0), "a": (0, 4), "c": (4, 0)}, "a", id="tie by id"),
    ],
)
def test_the_least_loaded_node_is_picked(loads: dict[str, tuple[int, int]], expected: str) -> None:
    endpoints = [
        view(endpoint_id, num_queued_prompt_tokens=queued, num_decoding=decoding)
        for endpoint_id, (queued, decoding) in loads.items()
    ]

    decision = LeastLoadPolicy().pick(REQUEST, endpoints, 0.0)

    assert decision.endpoint_id == expected
    assert decision.expected_gain is None


def test_without_nodes_nothing_is_picked_and_the_reason_says_so() -> None:
    decision = LeastLoadPolicy().pick(REQUEST, [], 0.0)

    assert decision.endpoint_id is None
    assert "no node" in decision.reason
