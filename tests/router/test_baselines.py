"""Every rule that GoRouting is compared with, by what it is for."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policy import RoutingPolicy, RoutingRequest
from router.routing_config import PolicyName, RoutingConfig
from tests.factories import make_profile
from tests.router.fleets import make_fleet, make_routing_request, make_snapshot, pick

CLASS_WEIGHTS = {"low": 1.0, "high": 4.0, "normal": 2.0}
NAMES = "abcdef"


def make_policy(name: PolicyName, **sections: object) -> RoutingPolicy:
    config = RoutingConfig.model_validate({"policy": name, **sections})
    return config.make_policy(CLASS_WEIGHTS)


def choices(
    policy: RoutingPolicy, num_nodes: int, num_picks: int, request: RoutingRequest | None = None
) -> str:
    """Return the one-letter nodes picked one after the other among idle ones."""
    fleet = make_fleet({name: make_snapshot() for name in NAMES[:num_nodes]})
    picked = [pick(policy, fleet, request).endpoint_id for _ in range(num_picks)]
    return "".join(str(name) for name in picked)


def test_round_robin_takes_each_in_turn() -> None:
    assert choices(make_policy("round-robin"), 3, 7) == "abcabca"


def test_round_robin_goes_on_behind_a_node_that_is_not_on_offer() -> None:
    policy = make_policy("round-robin")
    fleet = make_fleet({name: make_snapshot() for name in "abc"})

    picked = [pick(policy, fleet, exclude=exclude).endpoint_id for exclude in ("", "b", "", "c")]

    assert picked == ["a", "c", "a", "b"]


def test_random_takes_each_about_as_often_and_equal_seeds_draw_alike() -> None:
    """Of 3,000 draws each of 3 nodes gets 1,000; five standard deviations are 130."""
    first, again = (choices(make_policy("random", routing_seed=1), 3, 3000) for _ in range(2))

    assert first == again
    assert first != choices(make_policy("random", routing_seed=2), 3, 3000)
    assert all(870 < count < 1130 for count in Counter(first).values())
    assert set(first) == set("abc")


def test_least_request_counts_requests_of_all_kinds() -> None:
    fleet = make_fleet(
        {
            "a": make_snapshot((1.0, 1.0, 0.1), (1.0, 1.0, 0.1), num_running=1),
            "b": make_snapshot(num_running=2, num_queued_prompt_tokens=9999),
        }
    )

    assert pick(make_policy("least-request"), fleet).endpoint_id == "b"


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
    fleet = make_fleet(
        {
            name: make_snapshot(num_queued_prompt_tokens=queued, num_decoding=decoding)
            for name, (queued, decoding) in loads.items()
        }
    )

    decision = pick(make_policy("least-load"), fleet)

    assert decision.endpoint_id == expected
    assert decision.expected_gain is None


def test_power_of_two_never_takes_the_most_loaded() -> None:
    """Of any two, it is not the better one; each of the others is, now and then."""
    fleet = make_fleet(
        {name: make_snapshot(num_decoding=load) for name, load in (("a", 1), ("b", 2), ("c", 3))}
    )
    policy = make_policy("power-of-two")

    assert {pick(policy, fleet).endpoint_id for _ in range(100)} == {"a", "b"}
    assert pick(policy, fleet, exclude=["a", "b"]).endpoint_id == "c"


def test_prefix_aware_goes_where_the_longest_beginning_was_seen() -> None:
    """`b` has the first 128 tokens, `c` 256 of them; `a` is idle."""
    policy = make_policy("prefix-aware")
    fleet = make_fleet({name: make_snapshot(num_running=name != "a") for name in "abc"})
    short, long = (make_routing_request(num_prompt_tokens=tokens) for tokens in (200, 400))
    pick(policy, fleet, short, exclude=["a", "c"])
    pick(policy, fleet, long, exclude=["a", "b"])

    assert pick(policy, fleet, long).endpoint_id == "c"
    unknown = make_routing_request(prompt_token_ids=tuple(range(1000, 1300)))
    assert pick(policy, fleet, unknown).endpoint_id == "a"


def test_prefix_aware_balances_once_load_is_uneven() -> None:
    """The beginning was seen at `a`, which has 3 requests; up to 2 more than `b` are even."""
    request = make_routing_request(num_prompt_tokens=400)
    for max_spread, expected in ((3, "a"), (2, "b")):
        policy = make_policy("prefix-aware", prefix_aware={"max_spread": max_spread})
        fleet = make_fleet({"a": make_snapshot(num_running=3), "b": make_snapshot()})
        pick(policy, fleet, request, exclude=["b"])

        assert pick(policy, fleet, request).endpoint_id == expected


@pytest.mark.parametrize(
    ("num_nodes", "sections", "expected"),
    [
        pytest.param(6, {}, {"high": "aba", "normal": "cdc", "low": "efe"}, id="even thirds"),
        pytest.param(
            6,
            {"static_partition": {"low": 1, "normal": 2, "high": 3}},
            {"low": "aaa", "normal": "bcb", "high": "def"},
            id="shares, in the order that they are given",
        ),
        pytest.param(
            2, {}, {"high": "aaa", "normal": "bbb", "low": "bbb"}, id="fewer nodes than classes"
        ),
        pytest.param(
            4,
            {"static_partition": {"high": 98, "normal": 1, "low": 1}},
            {"high": "abc", "normal": "ddd", "low": "ddd"},
            id="a node at least for each",
        ),
    ],
)
def test_static_partition_gives_each_class_its_nodes_in_turn(
    num_nodes: int, sections: dict[str, object], expected: dict[str, str]
) -> None:
    for name, nodes in expected.items():
        policy = make_policy("static-partition", **sections)
        request = make_routing_request(priority_class=name)

        assert choices(policy, num_nodes, 3, request) == nodes


def test_a_class_whose_nodes_are_all_gone_uses_the_others() -> None:
    fleet = make_fleet({name: make_snapshot() for name in "abc"})
    request = make_routing_request(priority_class="high")

    decision = pick(make_policy("static-partition"), fleet, request, exclude=["a"])

    assert decision.endpoint_id == "b"
    assert "no node of class high" in decision.reason


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param({"free": 500}, {"free": 600}, "b", id="blocks in use"),
        pytest.param({"free": 600, "queued": 3200}, {"free": 500}, "b", id="400 against 500"),
        pytest.param(
            {"free": 600, "running": 2}, {"free": 500, "running": 1}, "b", id="300 against 500 each"
        ),
        pytest.param(
            {"free": 600, "weight": 4.0}, {"free": 550, "weight": 2.0}, "b",
            id="100 of 1,000 blocks are kept free for the highest class",
        ),
    ],
)  # fmt: skip
def test_llumnix_takes_the_freest_node_per_running_request(
    a: dict[str, float], b: dict[str, float], expected: str
) -> None:
    fleet = make_fleet(
        {
            name: make_snapshot(
                (1.0, state.get("weight", 1.0), 0.1),
                num_free_device_blocks=int(state["free"]),
                num_queued_prompt_tokens=int(state.get("queued", 0)),
                num_running=int(state.get("running", 1)),
            )
            for name, state in (("a", a), ("b", b))
        }
    )

    assert pick(make_policy("llumnix"), fleet).endpoint_id == expected


def test_slo_aware_takes_the_node_that_is_past_the_prompt_first() -> None:
    """`fast` has more work waiting, 0.3 s, but computes the 1,000 tokens in 0.1 s, not in 1 s."""
    fleet = make_fleet(
        {
            "fast": make_snapshot((9.0, 1.0, 0.3), profile=make_profile(prefill_token_s=0.0001)),
            "slow": make_snapshot((9.0, 1.0, 0.1)),
        }
    )

    assert pick(make_policy("slo-aware"), fleet).endpoint_id == "slow"
    long = make_routing_request(num_prompt_tokens=1000)
    assert pick(make_policy("slo-aware"), fleet, long).endpoint_id == "fast"


def test_highest_load_feasible_packs_as_long_as_the_first_token_is_in_time() -> None:
    """With a step and the request's 20 ms: 0.53, 0.87 and 0.93 s; 0.9 s are in time."""
    fleet = make_fleet(
        {name: make_snapshot((9.0, 1.0, s)) for name, s in (("a", 0.5), ("b", 0.84), ("c", 0.9))}
    )
    policy = make_policy("highest-load-feasible")

    assert pick(policy, fleet).endpoint_id == "b"
    assert pick(policy, fleet, make_routing_request(ttft_s=0.1)).endpoint_id == "a"


@given(
    name=st.sampled_from(get_args(PolicyName)),
    loads=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    excluded=st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=4),
    priority_class=st.sampled_from(sorted(CLASS_WEIGHTS)),
)
def test_no_policy_picks_a_node_that_is_not_on_offer(
    name: PolicyName, loads: list[int], excluded: list[set[int]], priority_class: str
) -> None:
    """Also one after the other, for those that remember."""
    policy = make_policy(name)
    fleet = make_fleet({NAMES[i]: make_snapshot(num_decoding=load) for i, load in enumerate(loads)})
    request = make_routing_request(num_prompt_tokens=300, priority_class=priority_class)
    for out in excluded:
        exclude = [NAMES[i] for i in out if i < len(loads)]

        decision = pick(policy, fleet, request, exclude=exclude)

        allowed = set(fleet.endpoint_ids) - set(exclude)
        assert decision.endpoint_id in allowed if allowed else decision.endpoint_id is None
