"""GoRouting against the arithmetic of its specification.

A prompt costs 1 ms per token and a step 10 ms, whatever the context, unless a test says otherwise;
the default request has 10 tokens, weight 1, and is due within a second of 0.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fleet import EndpointSnapshot
from router.gorouting import GainEstimate, GoRoutingOptions, GoRoutingPolicy, IdleRule, LostRule
from tests.factories import make_profile
from tests.router.fleets import make_fleet, make_routing_request, make_snapshot, pick


def busy(work_s: float, *, due_in_s: float = 100.0, weight: float = 1.0) -> EndpointSnapshot:
    """One prompt that takes so long without the step's 10 ms, by default with all the time."""
    return make_snapshot((due_in_s, weight, work_s))


def choice(snapshots: dict[str, EndpointSnapshot], **options: object) -> str | None:
    """Return where the default request goes."""
    policy = GoRoutingPolicy(GoRoutingOptions(**options))  # type: ignore[arg-type]
    return pick(policy, make_fleet(snapshots)).endpoint_id


def gains(snapshots: dict[str, EndpointSnapshot], **request: float) -> dict[str, float | None]:
    """Return what a request would add at each node, were it the only one on offer."""
    fleet = make_fleet(snapshots)
    return {
        endpoint_id: pick(
            GoRoutingPolicy(),
            fleet,
            make_routing_request(**request),  # type: ignore[arg-type]
            exclude=[other for other in snapshots if other != endpoint_id],
        ).expected_gain
        for endpoint_id in snapshots
    }


# --- gain (30, 31) ------------------------------------------------------------------------------


def test_the_gain_is_the_own_first_token_where_it_is_in_time() -> None:
    """Due in 1 s, of which 0.9 count. With a step for each of the two prompts and the request's
    10 ms of work: 0.869 + 0.030 = 0.899 s are in time, 0.871 + 0.030 = 0.901 s are not."""
    assert gains({"in-time": busy(0.869), "late": busy(0.871)}, weight=3.0) == {
        "in-time": 3.0,
        "late": 0.0,
    }


def test_the_gain_of_queued_prompts_that_come_too_late_is_taken_off() -> None:
    """The queue takes 0.1 + 0.01 s, and 0.13 s with the request.

    `tight` is due in 0.14 s, of which 0.126 count: in time without, late with the request.
    `loose` is due in 0.15 s (0.135 count): in time either way. `lost` is due in 0.11 s (0.099
    count): late either way, so nobody makes it later.
    """
    assert gains(
        {
            "tight": busy(0.1, due_in_s=0.14, weight=2.0),
            "loose": busy(0.1, due_in_s=0.15, weight=2.0),
            "lost": busy(0.1, due_in_s=0.11, weight=2.0),
        },
        weight=3.0,
    ) == {"tight": 1.0, "loose": 3.0, "lost": 3.0}


def test_the_gain_is_negative_where_others_lose_more_than_the_request_wins() -> None:
    """As `tight` above, with a queued prompt of weight 5: 3 - 5."""
    assert gains({"a": busy(0.1, due_in_s=0.14, weight=5.0)}, weight=3.0) == {"a": -2.0}


def test_a_request_without_a_deadline_is_in_time_everywhere() -> None:
    assert gains({"a": busy(1e6)}, ttft_s=math.inf) == {"a": 1.0}


def test_a_prompt_without_a_deadline_loses_nothing() -> None:
    assert gains({"a": make_snapshot((None, 5.0, 0.5))}) == {"a": 1.0}


# --- candidates (32) and cases ------------------------------------------------------------------


def test_a_node_whose_gain_is_not_near_the_best_is_no_candidate() -> None:
    """`cheap` is idle but would cost a queued prompt of weight 0.2; 0.8 is below 0.9 of 1."""
    snapshots = {
        "costly": busy(0.05, due_in_s=0.08, weight=0.2),
        "loaded": busy(0.5),
    }
    assert choice(snapshots) == "loaded"
    assert choice(snapshots, theta_c=0.7) == "costly"


def test_a_candidate_that_is_as_good_as_idle_goes_first() -> None:
    """Case (i): loads of 0.06, 0.05 and 0.5 s; below 0.1 s is as good as idle."""
    assert choice({"a": busy(0.05), "b": busy(0.04), "c": busy(0.49)}) == "b"


def test_the_most_loaded_of_those_that_stay_light_is_filled_up() -> None:
    """Case (iii): with the request 0.33, 0.43 and 0.83 s; up to 0.8 s is light."""
    assert choice({"a": busy(0.30), "b": busy(0.40), "c": busy(0.80)}) == "b"


def test_the_least_loaded_is_taken_if_all_would_be_heavy() -> None:
    """Case (ii): with the request 0.84 and 0.83 s, above 0.8 s and still in time."""
    assert choice({"a": busy(0.81), "b": busy(0.80)}) == "b"


@pytest.mark.parametrize(
    ("loads_s", "expected"),
    [
        pytest.param({"a": 0.3, "b": 0.2, "c": 0.4}, "b", id="none heavy: the least loaded"),
        pytest.param({"a": 0.3, "b": 0.2, "c": 0.8}, "a", id="some heavy: fill up the light"),
        pytest.param({"a": 0.05, "b": 0.2, "c": 0.8}, "b", id="an idle one is filled up last"),
        pytest.param({"a": 0.81, "b": 0.80}, "b", id="all heavy: the least loaded"),
    ],
)
def test_the_other_reading_of_case_one_asks_whether_anybody_is_heavy(
    loads_s: dict[str, float], expected: str
) -> None:
    snapshots = {endpoint_id: busy(load_s) for endpoint_id, load_s in loads_s.items()}

    assert choice(snapshots, idle_rule=IdleRule.NONE_HEAVY) == expected


@pytest.mark.parametrize(
    ("lost_rule", "expected"),
    [(LostRule.TOGETHER, "a"), (LostRule.LEAST_LOADED, "b")],
)
def test_what_is_late_everywhere_piles_up_or_spreads_by_the_rule(
    lost_rule: LostRule, expected: str
) -> None:
    snapshots = {"a": busy(5.0), "b": busy(3.0), "c": busy(4.0)}

    assert choice(snapshots, lost_rule=lost_rule) == expected


@pytest.mark.parametrize(
    ("lost_rule", "expected"),
    [(LostRule.TOGETHER, "a"), (LostRule.LEAST_LOADED, "b")],
)
def test_with_losses_everywhere_lost_requests_go_where_they_cost_the_least(
    lost_rule: LostRule, expected: str
) -> None:
    """Each would lose a queued prompt: of weight 5 at `a`, of 7 at `b` and `c`. The paper's rule
    looks at the load alone."""
    snapshots = {
        "a": busy(0.1, due_in_s=0.14, weight=5.0),
        "b": busy(0.05, due_in_s=0.08, weight=7.0),
        "c": busy(0.2, due_in_s=0.24, weight=7.0),
    }

    assert choice(snapshots, lost_rule=lost_rule) == expected


def test_a_request_of_no_weight_goes_to_the_least_loaded_by_the_papers_rule() -> None:
    fleet = make_fleet({"a": busy(0.4), "b": busy(0.3)})
    policy = GoRoutingPolicy(GoRoutingOptions(lost_rule=LostRule.LEAST_LOADED))

    decision = pick(policy, fleet, make_routing_request(weight=0.0))

    assert decision.endpoint_id == "b"
    assert decision.expected_gain == 0.0


def test_a_single_node_takes_everything() -> None:
    for work_s in (0.0, 0.5, 50.0):
        assert choice({"only": busy(work_s)}) == "only"


def test_equal_nodes_are_taken_in_the_order_of_their_ids() -> None:
    for work_s in (0.0, 0.5, 0.85, 50.0):
        assert choice({"c": busy(work_s), "a": busy(work_s), "b": busy(work_s)}) == "a"


def test_without_nodes_nothing_is_picked_and_the_reason_says_so() -> None:
    decision = pick(GoRoutingPolicy(), make_fleet({"a": busy(0.0)}), exclude=["a"])

    assert decision.endpoint_id is None
    assert "no node" in decision.reason


def test_whether_the_first_token_is_expected_in_time_is_said() -> None:
    for work_s, is_satisfiable in ((0.869, True), (0.871, False)):
        decision = pick(GoRoutingPolicy(), make_fleet({"a": busy(work_s)}))

        assert decision.is_satisfiable is is_satisfiable


def test_time_that_has_passed_since_a_snapshot_counts_as_work_done() -> None:
    """200 ms later 0.3 s of work are 0.1 s: less than the 0.15 s that a fresh snapshot shows."""
    fleet = make_fleet(
        {
            "old": make_snapshot((100.0, 1.0, 0.30), taken_at_s=0.0),
            "fresh": make_snapshot((100.0, 1.0, 0.15), taken_at_s=0.2),
        }
    )
    request = make_routing_request(arrival_s=0.2, ttft_s=2.0)

    assert pick(GoRoutingPolicy(), fleet, request, now_s=0.2).endpoint_id == "old"


# --- the estimate by position -------------------------------------------------------------------


def by_position(snapshot: EndpointSnapshot, *, ttft_s: float = 1.0) -> float | None:
    policy = GoRoutingPolicy(GoRoutingOptions(estimate=GainEstimate.POSITION))
    return pick(
        policy, make_fleet({"a": snapshot}), make_routing_request(ttft_s=ttft_s)
    ).expected_gain


def test_by_position_only_what_is_due_later_can_lose() -> None:
    """One step of up to 110 ms holds 100 ms of work. The request adds 10 ms of work.

    `tight` is due in 0.15 s, of which 0.8 count, 120 ms: it is in time at the end of the first
    step. If the request is due later, tight stays in that. If it is due sooner, in 0.14 s (112 ms
    count), it takes the first step to 110 ms, and tight's last work is in a second one, which
    ends at 105 + 20 ms.
    """
    tight = make_snapshot((0.15, 5.0, 0.095), latency_budget_s=0.110)

    assert by_position(tight, ttft_s=1.0) == 1.0
    assert by_position(tight, ttft_s=0.14) == 1.0 - 5.0


def test_by_position_a_full_step_ends_with_its_budget() -> None:
    """250 ms of work before the request's 10: the first steps of 110 ms are full, the third is
    not: 260 + 3 * 10 ms = 0.29 s. In a queue that fills it, the third ends at 0.33 s.

    Due in 0.4 s, 0.32 count: in time after the open step, late after the full one.
    """
    before = (0.1, 1.0, 0.250)

    assert by_position(make_snapshot(before, latency_budget_s=0.110), ttft_s=0.4) == 1.0
    filled = make_snapshot(before, (50.0, 1.0, 5.0), latency_budget_s=0.110)
    assert by_position(filled, ttft_s=0.4) == 0.0


def test_by_position_without_a_budget_all_is_one_step() -> None:
    """0.3 + 0.01 + 0.01 s = 0.32 s; 0.8 of 0.41 s are 0.328 s."""
    assert by_position(make_snapshot((0.1, 1.0, 0.3)), ttft_s=0.41) == 1.0
    assert by_position(make_snapshot((0.1, 1.0, 0.3)), ttft_s=0.39) == 0.0


def test_by_position_passed_time_counts_as_work_done_but_not_for_more_than_there_was() -> None:
    """0.1 s of work are done after 0.5 s; the request's own 10 + 10 ms are still to come."""
    policy = GoRoutingPolicy(GoRoutingOptions(estimate=GainEstimate.POSITION))
    fleet = make_fleet({"a": make_snapshot((0.05, 1.0, 0.1))})

    for ttft_s, gain in ((0.026, 1.0), (0.024, 0.0)):
        request = make_routing_request(arrival_s=0.5, ttft_s=ttft_s)

        assert pick(policy, fleet, request, now_s=0.5).expected_gain == gain


# --- extensions ---------------------------------------------------------------------------------


def test_running_requests_that_would_become_too_slow_count_as_loss() -> None:
    """9 running requests of weight 2 each make a step of 10 + 9 = 19 ms, 20 with the request;
    objectives of 16 ms then leave 1 - 16/20 late instead of 1 - 16/19, and of the request's own
    tokens 1 - 16/20: a loss of 18 * (0.2 - 3/19) + 0.2 per token.
    """
    fleet = make_fleet(
        {"a": make_snapshot(num_decoding=9, decode_weight=18.0, min_decode_tpot_s=0.016)}
    )
    policy = GoRoutingPolicy(GoRoutingOptions(decode_loss_weight=10.0))

    decision = pick(policy, fleet, make_routing_request(tpot_s=0.016))

    assert decision.expected_gain == pytest.approx(1.0 - 10 * (18 * (0.2 - 3 / 19) + 0.2))


def test_a_node_that_is_fast_enough_for_its_running_requests_loses_none() -> None:
    fleet = make_fleet(
        {"a": make_snapshot(num_decoding=9, decode_weight=18.0, min_decode_tpot_s=0.021)}
    )
    policy = GoRoutingPolicy(GoRoutingOptions(decode_loss_weight=10.0))

    assert pick(policy, fleet, make_routing_request(tpot_s=0.021)).expected_gain == 1.0


def test_nodes_without_free_blocks_are_left_out_unless_all_are() -> None:
    """`full` is idle; 20 queued and 10 new tokens need more than the 16 of its one free block."""
    full = make_snapshot(num_queued_prompt_tokens=20, num_free_device_blocks=1)
    snapshots = {"full": full, "loaded": busy(0.5)}

    assert choice(snapshots) == "full"
    assert choice(snapshots, needs_free_blocks=True) == "loaded"
    assert choice({"full": full}, needs_free_blocks=True) == "full"


def test_the_least_loaded_node_may_be_the_one_that_is_past_the_request_first() -> None:
    """The prompt of 10 tokens takes `slow` 0.1 s and `fast` 10 ms; both are as good as idle."""
    snapshots = {
        "fast": busy(0.05),
        "slow": make_snapshot(profile=make_profile(prefill_token_s=0.01)),
    }
    assert choice(snapshots) == "slow"
    assert choice(snapshots, ranks_with_request=True) == "fast"


def test_a_known_beginning_makes_a_prompt_cheaper_where_it_was_sent() -> None:
    """1,000 tokens cost 1 s, too long for a deadline in 1 s; with 896 known ones 104 ms."""
    policy = GoRoutingPolicy(GoRoutingOptions(prefix_reuse=True))
    fleet = make_fleet({"a": busy(0.0), "b": busy(0.4)})
    request = make_routing_request(num_prompt_tokens=1000)
    assert pick(policy, fleet, request, exclude=["a"]).expected_gain == 0.0

    again = pick(policy, fleet, request)

    assert (again.endpoint_id, again.expected_gain) == ("b", 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappa": 0.0}, "kappa is 0.0, it must be above 0"),
        ({"kappa": 1.1}, "kappa is 1.1"),
        ({"theta_c": 1.0}, "theta_c is 1.0, it must be at least 0 and below 1"),
        ({"theta_lo": -0.1}, "theta_lo is -0.1"),
        ({"theta_hi": math.inf}, "theta_hi is inf"),
        ({"position_safety": 0.0}, "position_safety is 0.0"),
        ({"decode_loss_weight": -1.0}, "decode_loss_weight is -1.0"),
        ({"steps_per_prompt": 1.5}, "steps_per_prompt is 1.5, it must be between 0 and 1"),
    ],
)
def test_impossible_parameters_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GoRoutingOptions(**options)  # type: ignore[arg-type]


# --- properties ---------------------------------------------------------------------------------

prefills = st.tuples(st.floats(-1, 3), st.floats(0, 4), st.floats(0, 1))
nodes = st.lists(st.lists(prefills, max_size=4).map(sorted), min_size=1, max_size=5)
options = st.builds(
    GoRoutingOptions,
    theta_lo=st.floats(0, 1),
    theta_hi=st.floats(0, 1),
    idle_rule=st.sampled_from(IdleRule),
    estimate=st.sampled_from(GainEstimate),
    decode_loss_weight=st.sampled_from([0.0, 5.0]),
    needs_free_blocks=st.booleans(),
)


@given(nodes=nodes, options=options, ttft_s=st.floats(0.01, 3), excluded=st.sets(st.integers(0, 4)))
def test_only_nodes_on_offer_are_picked_and_always_the_same_one(
    nodes: list[list[tuple[float, float, float]]],
    options: GoRoutingOptions,
    ttft_s: float,
    excluded: set[int],
) -> None:
    snapshots = {f"node-{i}": make_snapshot(*queue) for i, queue in enumerate(nodes)}
    request = make_routing_request(ttft_s=ttft_s)
    exclude = [f"node-{i}" for i in excluded if i < len(nodes)]

    first, again = (
        pick(GoRoutingPolicy(options), make_fleet(snapshots, options), request, exclude=exclude)
        for _ in range(2)
    )

    assert first == again
    allowed = set(snapshots) - set(exclude)
    assert first.endpoint_id in allowed if allowed else first.endpoint_id is None


@given(nodes=nodes, weight=st.floats(0.1, 4), ttft_s=st.floats(0.01, 3))
def test_the_expected_gain_is_that_of_the_definition(
    nodes: list[list[tuple[float, float, float]]], weight: float, ttft_s: float
) -> None:
    """(28) to (31) as loops over requests, in place of the differences that the policy looks at."""
    for index, queue in enumerate(nodes):
        fleet = make_fleet({f"node-{index}": make_snapshot(*queue)})
        request = make_routing_request(weight=weight, ttft_s=ttft_s)

        decision = pick(GoRoutingPolicy(), fleet, request)

        def gain(members: list[tuple[float, float, float]]) -> float:
            load_s = max(sum(work_s for *_, work_s in members) + 0.010 * len(members), 0.010)
            return math.fsum(w for due_s, w, _ in members if 0.9 * due_s > load_s)

        with_request = [*queue, (ttft_s, weight, 0.010)]
        assert decision.expected_gain == pytest.approx(gain(with_request) - gain(queue), abs=1e-9)
