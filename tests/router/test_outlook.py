"""Predictions of when prompts are computed: 1 ms a token and 10 ms a step."""

from __future__ import annotations

import math

import pytest

from router.fleet import EndpointSnapshot
from router.outlook import FleetOutlook
from router.policy import RoutingRequest
from tests.factories import make_profile
from tests.router.fleets import make_fleet, make_routing_request, make_snapshot


def node(work_s: float = 0.0, *, num_decoding: int = 0) -> EndpointSnapshot:
    """A node with two prompts that take `work_s` together."""
    prefills = ((1.0, 1.0, work_s / 2), (2.0, 1.0, work_s / 2)) if work_s else ()
    return make_snapshot(*prefills, num_decoding=num_decoding, taken_at_s=100.0)


def request(num_prompt_tokens: int, *, ttft_s: float) -> RoutingRequest:
    return make_routing_request(num_prompt_tokens=num_prompt_tokens, ttft_s=ttft_s, arrival_s=100.0)


def outlook_on(*nodes: EndpointSnapshot) -> FleetOutlook:
    fleet = make_fleet({f"node-{index}": snapshot for index, snapshot in enumerate(nodes)})
    return FleetOutlook(fleet, fleet.offer)


BUSY, IDLE = node(1.0), node(0.1)


@pytest.mark.parametrize(
    ("work_s", "num_decoding", "passed_s", "drain_s"),
    [
        (0.0, 7, 0.0, 0.0),
        (0.1, 0, 0.0, 0.110),  # one step
        (0.1, 20, 0.0, 0.130),  # with 20 tokens decoded in it
        (0.1, 0, 0.06, 0.050),  # of which 60 ms have passed
        (0.1, 0, 5.0, 0.0),
    ],
)
def test_a_queue_drains_as_time_passes(
    work_s: float, num_decoding: int, passed_s: float, drain_s: float
) -> None:
    outlook = outlook_on(node(work_s, num_decoding=num_decoding))

    assert outlook.drain_s(100.0 + passed_s) == pytest.approx(drain_s)


def test_the_first_node_to_drain_counts() -> None:
    assert outlook_on(BUSY, IDLE).drain_s(100.0) == pytest.approx(0.110)


def test_a_request_can_gain_while_one_node_computes_it_in_time() -> None:
    """Behind 100 ms of work, 200 tokens end after 310 ms: too late at 300 ms, in time at 320."""
    assert outlook_on(BUSY, IDLE).can_gain(request(200, ttft_s=0.320), 100.0)
    assert not outlook_on(BUSY, IDLE).can_gain(request(200, ttft_s=0.300), 100.0)
    assert not outlook_on(BUSY).can_gain(request(200, ttft_s=0.320), 100.0)


def test_a_node_that_cannot_follow_a_grammar_gives_no_hope_to_a_request_that_needs_one() -> None:
    """`free` is idle, but only `busy`, behind 1 s of work, can take the request."""
    free = make_snapshot(taken_at_s=100.0, grammar_obstacle="draws by itself")
    guided = make_routing_request(arrival_s=100.0, ttft_s=0.5, needs_grammar=True)
    any_form = make_routing_request(arrival_s=100.0, ttft_s=0.5)

    assert outlook_on(BUSY, free).can_gain(any_form, 100.0)
    assert not outlook_on(BUSY, free).can_gain(guided, 100.0)


def test_a_node_that_is_too_small_does_not_count() -> None:
    """The idle one takes sequences of 207 tokens; the request may have 200 + 8."""
    small = make_snapshot(max_model_len=207)

    assert not outlook_on(BUSY, small).can_gain(request(200, ttft_s=0.320), 100.0)


def test_the_time_already_spent_counts() -> None:
    """The queue has gone on for 20 ms, but that is no gain for who arrives with 20 ms less."""
    late = make_snapshot((1.0, 1.0, 0.1), taken_at_s=100.020)

    assert outlook_on(late).can_gain(request(200, ttft_s=0.331), 100.020)
    assert not outlook_on(late).can_gain(request(200, ttft_s=0.329), 100.020)


def test_without_an_objective_a_request_can_always_gain() -> None:
    assert outlook_on(node(1e6)).can_gain(request(4000, ttft_s=math.inf), 100.0)


def test_without_a_node_it_is_not_the_load_that_is_in_the_way() -> None:
    assert outlook_on().can_gain(request(200, ttft_s=0.001), 100.0)
    assert outlook_on().drain_s(100.0) == 0.0


def test_a_prompt_is_priced_by_each_nodes_own_profile() -> None:
    """500 tokens take 510 ms at 1 ms each, and 60 ms at 0.1 ms each."""
    slow = make_snapshot()
    fast = make_snapshot(profile=make_profile(prefill_token_s=0.0001))

    assert not outlook_on(slow).can_gain(request(500, ttft_s=0.1), 100.0)
    assert outlook_on(slow, fast).can_gain(request(500, ttft_s=0.1), 100.0)
