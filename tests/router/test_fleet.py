"""The books that routing policies decide by.

A prompt costs 1 ms per token and a step 10 ms, unless a test says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fleet import Dispatch, DrainOptions, EndpointSnapshot, Fleet
from tests.factories import make_profile
from tests.router.fleets import make_fleet, make_routing_request, make_snapshot


def load_s(fleet: Fleet, now_s: float = 0.0, *, prefill_s: float = 0.0) -> tuple[float, float]:
    """Return the load of the only node without and with a prompt that costs so much."""
    before_s, after_s = fleet.loads_s(np.array([prefill_s]), now_s)
    return float(before_s[0]), float(after_s[0])


# --- (28) and (29) ------------------------------------------------------------------------------


def test_a_step_costs_its_constant_and_one_token_of_each_running_request() -> None:
    """10 ms + 3 * 1 ms + 200 cached tokens * 5 us = 14 ms."""
    profile = replace(make_profile(), decode_context_s=5e-6, decode_step_s=0.007)
    fleet = make_fleet(
        {"a": make_snapshot(num_decoding=3, decode_context_tokens=200, profile=profile)}
    )

    assert fleet.figures.step_s.tolist() == pytest.approx([0.014])
    assert fleet.figures.decode_step_s.tolist() == pytest.approx([0.011])


def test_the_load_is_the_work_of_all_prompts_and_a_step_for_each() -> None:
    """0.1 + 0.2 s and 2 steps of 10 ms; with another of 50 ms 0.38 s. At least one step."""
    fleet = make_fleet({"a": make_snapshot((1.0, 1.0, 0.1), (2.0, 1.0, 0.2))})

    assert load_s(fleet, prefill_s=0.05) == pytest.approx((0.32, 0.38))
    assert load_s(make_fleet({"a": make_snapshot()})) == (0.010, 0.010)


def test_prompts_that_share_all_steps_add_their_work_alone() -> None:
    """0.3 s and one step of 10 ms; with another of 50 ms 0.36 s."""
    fleet = make_fleet(
        {"a": make_snapshot((1.0, 1.0, 0.1), (2.0, 1.0, 0.2))}, DrainOptions(steps_per_prompt=0.0)
    )

    assert load_s(fleet, prefill_s=0.05) == pytest.approx((0.31, 0.36))


def test_passed_time_is_taken_off_the_queue_but_not_off_what_comes_next() -> None:
    """Of 0.11 s, 0.05 s are left after 0.06 s; after 10 s the node is idle, not ahead of time."""
    fleet = make_fleet({"a": make_snapshot((1.0, 1.0, 0.1))})

    assert load_s(fleet, now_s=0.06, prefill_s=0.05) == pytest.approx((0.05, 0.11))
    assert load_s(fleet, now_s=10.0, prefill_s=0.05) == pytest.approx((0.010, 0.060))


def test_hopeless_prompts_are_not_waited_for_if_the_options_say_so() -> None:
    """Due in 0.10 s, 0.1 s of work and a step are too much; due in 0.12 s they are not."""
    snapshot = make_snapshot((-1.0, 1.0, 0.3), (0.10, 1.0, 0.1), (0.12, 1.0, 0.1))

    assert load_s(make_fleet({"a": snapshot}))[0] == pytest.approx(0.53)
    fleet = make_fleet({"a": snapshot}, DrainOptions(counts_hopeless=False))
    assert load_s(fleet)[0] == pytest.approx(0.11)


def test_a_hopeless_prompt_on_its_way_is_not_waited_for_either() -> None:
    """100 tokens take 0.11 s: due in 0.1 s they are hopeless, due in 0.2 s not."""
    fleet = make_fleet({"a": make_snapshot()}, DrainOptions(counts_hopeless=False))

    fleet.begin_dispatch("a", make_routing_request(num_prompt_tokens=100, ttft_s=0.1), 0.0)
    assert load_s(fleet)[0] == pytest.approx(0.010)
    fleet.begin_dispatch("a", make_routing_request(num_prompt_tokens=100, ttft_s=0.2), 0.0)
    assert load_s(fleet)[0] == pytest.approx(0.110)


def test_a_prompt_is_priced_by_each_nodes_own_profile_and_by_what_it_has_of_it() -> None:
    """(10) with a_p = b_p = 1 us, c_p = 1 ms, d_p = 10 us: 100 new tokens cost
    10 + 100 ms; 60 new ones after 40 cost 3.6 + 2.4 + 60 + 0.4 ms."""
    profile = replace(
        make_profile(), prefill_quadratic_s=1e-6, prefill_context_s=1e-6, prefill_cached_s=1e-5
    )
    fleet = make_fleet(
        {
            "a": make_snapshot(profile=profile),
            "b": make_snapshot(profile=make_profile(prefill_token_s=0.002)),
        }
    )

    assert fleet.prefill_s(100).tolist() == pytest.approx([0.110, 0.2])
    cached = np.array([40.0, 100.0])
    assert fleet.prefill_s(100, cached).tolist() == pytest.approx([0.0664, 0.0])
    assert profile.prefill_s(60, 40) == pytest.approx(0.0664)


# --- what was sent since the snapshot -----------------------------------------------------------


def test_a_request_counts_as_queued_then_as_running_then_not_at_all() -> None:
    fleet = make_fleet({"a": make_snapshot(num_queued_prompt_tokens=5, num_running=2)})

    def counts() -> list[float]:
        figures = fleet.figures
        columns = (figures.num_requests, figures.num_queued_tokens, figures.num_decoding)
        return [float(column[0]) for column in columns]

    dispatch = fleet.begin_dispatch("a", make_routing_request(num_prompt_tokens=100), 0.0)
    assert counts() == [3, 105, 0]
    assert load_s(fleet)[0] == pytest.approx(0.110)
    fleet.note_first_token(dispatch)
    assert counts() == [3, 5, 1]
    assert load_s(fleet)[0] == pytest.approx(0.011)
    fleet.end_dispatch(dispatch)
    assert counts() == [2, 5, 0]
    assert load_s(fleet)[0] == pytest.approx(0.010)


def test_a_snapshot_takes_the_place_of_what_was_sent_before_it() -> None:
    fleet = make_fleet({"a": make_snapshot()})
    before = fleet.begin_dispatch("a", make_routing_request(num_prompt_tokens=100), 1.0)
    fleet.begin_dispatch("a", make_routing_request(num_prompt_tokens=30), 2.0)

    fleet.see("a", make_snapshot(num_queued_prompt_tokens=60, complete_until_s=1.5))

    assert fleet.figures.num_queued_tokens.tolist() == [90]
    fleet.end_dispatch(before)  # the node knows
    assert fleet.figures.num_queued_tokens.tolist() == [90]


def test_what_a_process_took_with_it_is_not_held_against_the_next_one() -> None:
    """It was sent while the new process was being asked, so the time alone does not tell."""
    fleet = make_fleet({"a": make_snapshot(instance_id="first")})
    lost = fleet.begin_dispatch("a", make_routing_request(num_prompt_tokens=100), 1.0)

    fleet.see("a", make_snapshot(instance_id="second", complete_until_s=1.0))
    begun = fleet.begin_dispatch("a", make_routing_request(num_prompt_tokens=30), 2.0)

    assert (lost.instance_id, begun.instance_id) == ("first", "second")
    assert fleet.figures.num_queued_tokens.tolist() == [30]
    fleet.end_dispatch(lost)
    assert fleet.figures.num_queued_tokens.tolist() == [30]


def test_a_prompt_sent_to_a_node_that_has_drained_begins_when_it_is_sent() -> None:
    """0.11 s of work at 0; 100 tokens come at 5: past them at 5.11, so 0.06 s are left at 5.05."""
    fleet = make_fleet({"a": make_snapshot((1.0, 1.0, 0.1))})
    fleet.begin_dispatch("a", make_routing_request(num_prompt_tokens=100, arrival_s=5.0), now_s=5.0)

    assert load_s(fleet, now_s=5.05)[0] == pytest.approx(0.06)


def test_queues_of_any_length_fit() -> None:
    """Each prompt is 10 ms of work and a step of 10 ms."""
    fleet = make_fleet({"a": make_snapshot(), "b": make_snapshot((1.0, 7.0, 0.5))})
    for index in range(40):
        fleet.begin_dispatch("a", make_routing_request(ttft_s=1 + (index * 7) % 40), now_s=0.0)

    assert np.sort(fleet.due_s[0, :40]).tolist() == [float(due) for due in range(1, 41)]
    assert fleet.due_s[0, :40].tolist() == sorted(fleet.due_s[0, :40].tolist())
    assert fleet.weight.sum(axis=1).tolist() == [40.0, 7.0]
    assert fleet.figures.drained_at_s.tolist() == pytest.approx([0.8, 0.51])


# --- who is on offer ----------------------------------------------------------------------------


def test_a_node_is_on_offer_until_the_moment_that_was_said() -> None:
    fleet = make_fleet({"a": make_snapshot()})
    fleet.allow("a", until_s=2.0)

    assert [fleet.offer(now_s, 1).tolist() for now_s in (1.9, 2.0, 2.1)] == [
        [True],
        [True],
        [False],
    ]
    fleet.allow("a", until_s=-math.inf)
    assert fleet.offer(0.0, 1).tolist() == [False]


def test_a_node_that_nothing_is_known_of_is_not_on_offer() -> None:
    assert Fleet(["a"]).offer(0.0, 1).tolist() == [False]


def test_a_process_that_failed_on_a_sequence_is_not_on_offer_and_the_next_one_is() -> None:
    fleet = make_fleet(
        {"a": make_snapshot(instance_id="bad"), "b": make_snapshot(instance_id="good")}
    )

    assert fleet.offer(0.0, 1, exclude=("bad",)).tolist() == [False, True]
    fleet.see("a", make_snapshot(instance_id="new"))
    assert fleet.offer(0.0, 1, exclude=("bad",)).tolist() == [True, True]


def test_only_nodes_that_can_hold_the_sequence_are_on_offer() -> None:
    """Two blocks of 16 hold 32 tokens, and the last token needs none; `short` takes 20."""
    fleet = make_fleet(
        {"small": make_snapshot(num_device_blocks=2), "short": make_snapshot(max_model_len=20)}
    )

    assert fleet.endpoint_ids == ("short", "small")
    assert [fleet.offer(0.0, tokens).tolist() for tokens in (20, 33, 34)] == [
        [True, True],
        [False, True],
        [False, False],
    ]


def test_only_nodes_that_follow_grammars_are_on_offer_where_one_is_needed() -> None:
    fleet = make_fleet(
        {"free": make_snapshot(grammar_obstacle="draws by itself"), "guided": make_snapshot()}
    )

    assert fleet.offer(0.0, 1, needs_grammar=True).tolist() == [False, True]
    assert fleet.offer(0.0, 1).tolist() == [True, True]


def test_nodes_that_come_and_go_leave_the_others_as_they_were() -> None:
    """`b` has 10 queued tokens and stays; `a` goes, and comes back as one of which nothing is
    known."""
    fleet = make_fleet({"a": make_snapshot(), "b": make_snapshot(num_queued_prompt_tokens=10)})

    fleet.remove("a")

    assert list(fleet.endpoint_ids) == ["b"]
    assert fleet.figures.num_queued_tokens.tolist() == [10]
    fleet.add("c")
    fleet.add("a")
    assert list(fleet.endpoint_ids) == ["a", "b", "c"]
    assert fleet.figures.num_queued_tokens.tolist() == [0, 10, 0]
    assert fleet.offer(0.0, 1).tolist() == [False, True, False]


def test_a_dispatch_on_a_node_that_is_gone_ends_without_a_trace() -> None:
    """Also when another node has come under the same id."""
    fleet = make_fleet({"a": make_snapshot(), "b": make_snapshot()})
    begun = fleet.begin_dispatch("a", make_routing_request(), 1.0)
    fleet.remove("a")
    fleet.note_first_token(begun)
    fleet.add("a")
    fleet.see("a", make_snapshot(num_queued_prompt_tokens=10))

    fleet.end_dispatch(begun)

    assert fleet.figures.num_queued_tokens.tolist() == [10, 0]


# --- properties ---------------------------------------------------------------------------------

snapshots = st.builds(
    lambda queue, num_decoding, tokens: make_snapshot(
        *sorted(queue),
        num_decoding=num_decoding,
        num_running=num_decoding,
        num_queued_prompt_tokens=tokens,
        decode_weight=float(num_decoding),
    ),
    st.lists(st.tuples(st.floats(-2, 5), st.floats(0, 4), st.floats(0, 1)), max_size=20),
    st.integers(0, 8),
    st.integers(0, 500),
)
events = st.one_of(
    st.tuples(st.just("see"), st.integers(0, 2), snapshots),
    st.tuples(st.just("begin"), st.integers(0, 2), st.integers(1, 300)),
    st.tuples(st.just("first token"), st.integers(0, 30), st.none()),
    st.tuples(st.just("end"), st.integers(0, 30), st.none()),
    st.tuples(st.just("come or go"), st.integers(0, 2), st.none()),
)


drains = st.builds(
    DrainOptions, steps_per_prompt=st.sampled_from([0.0, 0.5, 1.0]), counts_hopeless=st.booleans()
)


@given(events=st.lists(events, max_size=40), drain=drains)
def test_books_kept_event_by_event_are_those_made_anew(
    events: list[tuple[str, int, object]], drain: DrainOptions
) -> None:
    """A new fleet that is shown only the last snapshots and the live requests since says the
    same to the last bit."""
    names = ["a", "b", "c"]
    fleet = Fleet(names, drain)
    last: dict[str, EndpointSnapshot] = {}
    live: list[Dispatch] = []
    for number, (kind, index, detail) in enumerate(events):
        now_s = float(number)
        if kind == "come or go":
            live = [d for d in live if d.endpoint_id != names[index]]
            last.pop(names[index], None)
            change = fleet.remove if names[index] in fleet.endpoint_ids else fleet.add
            change(names[index])
        elif isinstance(detail, EndpointSnapshot) and names[index] in fleet.endpoint_ids:
            last[names[index]] = replace(detail, taken_at_s=now_s, complete_until_s=now_s)
            fleet.see(names[index], last[names[index]])
        elif kind == "begin" and isinstance(detail, int) and names[index] in last:
            request = make_routing_request(num_prompt_tokens=detail, arrival_s=now_s)
            live.append(fleet.begin_dispatch(names[index], request, now_s))
        elif live and kind == "first token":
            fleet.note_first_token(live[index % len(live)])
        elif live and kind == "end":
            fleet.end_dispatch(live.pop(index % len(live)))

    anew = Fleet(fleet.endpoint_ids, drain)
    for name, snapshot in last.items():
        anew.see(name, snapshot)
    for dispatch in sorted(live, key=lambda d: d.sent_at_s):
        seen = last.get(dispatch.endpoint_id)
        if seen is None or dispatch.sent_at_s >= seen.complete_until_s:
            copy = anew.begin_dispatch(dispatch.endpoint_id, dispatch.request, dispatch.sent_at_s)
            if dispatch.has_first_token:
                anew.note_first_token(copy)

    for name, column in fleet.figures._asdict().items():
        assert np.array_equal(column, getattr(anew.figures, name)), name
    width = min(fleet.due_s.shape[1], anew.due_s.shape[1])
    for kept, made in ((fleet.due_s, anew.due_s), (fleet.weight, anew.weight)):
        assert np.array_equal(kept[:, :width], made[:, :width])


@given(
    until_s=st.lists(st.floats(-10, 10), min_size=1, max_size=6),
    now_s=st.floats(-10, 10),
    excluded=st.sets(st.integers(0, 5)),
)
def test_nobody_is_on_offer_beyond_its_time_or_excluded(
    until_s: list[float], now_s: float, excluded: set[int]
) -> None:
    """Invariant 8 of the architecture: a snapshot that is too old, or a node that drains, ends
    the time in which it is on offer."""
    names = [f"node-{index}" for index in range(len(until_s))]
    fleet = make_fleet({name: make_snapshot(instance_id=name) for name in names})
    for name, until in zip(names, until_s, strict=True):
        fleet.allow(name, until_s=until)

    offered = fleet.offer(now_s, 1, exclude=[names[i] for i in excluded if i < len(names)])

    expected = [until >= now_s and i not in excluded for i, until in enumerate(until_s)]
    assert offered.tolist() == expected
