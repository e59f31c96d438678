from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.health import BreakerRules, CircuitBreaker, SlowStart

RULES = BreakerRules(num_failures=3, first_open_s=1.0, max_open_s=5.0)


def fail(breaker: CircuitBreaker, now_s: float) -> None:
    """One request that begins and fails."""
    attempt = object()
    breaker.begin(attempt, now_s)
    breaker.fail(attempt, now_s)
    breaker.end(attempt)


def succeed(breaker: CircuitBreaker, now_s: float) -> bool:
    """One request that is answered to its end; return whether it closed the breaker."""
    attempt = object()
    breaker.begin(attempt, now_s)
    has_closed = breaker.answer(attempt)
    breaker.succeed()
    breaker.end(attempt)
    return has_closed


def opened(num_failures: int = 3) -> CircuitBreaker:
    breaker = CircuitBreaker(RULES)
    for _ in range(num_failures):
        fail(breaker, 0.0)
    return breaker


def test_three_failures_in_a_row_open_it_for_a_second() -> None:
    assert opened(2).obstacle(0.0) is None

    breaker = opened(3)

    assert breaker.obstacle(0.25) == "failed 3 times in a row, is tried again in 0.8 s"
    assert breaker.obstacle(1.0) is None


def test_a_success_in_between_starts_the_count_anew() -> None:
    breaker = opened(2)
    succeed(breaker, 0.0)
    fail(breaker, 0.0)
    fail(breaker, 0.0)

    assert breaker.obstacle(0.0) is None


def test_one_node_death_with_many_requests_is_one_opening() -> None:
    breaker = CircuitBreaker(RULES)
    attempts = [object() for _ in range(64)]
    for attempt in attempts:
        breaker.begin(attempt, 0.0)
    for attempt in attempts:
        breaker.fail(attempt, 0.0)

    assert breaker.obstacle(1.0) is None


def test_half_open_lets_one_request_through() -> None:
    breaker = opened()
    probe = object()
    breaker.begin(probe, 1.0)

    assert breaker.obstacle(1.0) == "failed 3 times in a row, is being tried with one request"


def test_an_answered_probe_closes_it() -> None:
    breaker = opened()

    assert succeed(breaker, 1.0)

    assert breaker.obstacle(1.0) is None
    assert not succeed(breaker, 1.1), "it was closed already"


def test_a_failed_probe_opens_it_for_twice_as_long_up_to_the_limit() -> None:
    """1 s, then 2, 4, and 5 in place of 8."""
    breaker = opened()
    now_s = 0.0
    for open_s in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert breaker.obstacle(now_s + open_s - 0.01) is not None
        now_s += open_s
        assert breaker.obstacle(now_s) is None
        fail(breaker, now_s)


def test_after_an_answered_probe_one_failure_is_enough_until_a_request_has_succeeded() -> None:
    """A node that dies behind each first token is not taken for a good one."""
    breaker = opened()
    probe = object()
    breaker.begin(probe, 1.0)
    breaker.answer(probe)
    breaker.fail(probe, 1.0)
    assert breaker.obstacle(2.9) is not None, "open for two seconds"

    succeed(breaker, 3.0)
    fail(breaker, 3.0)

    assert breaker.obstacle(3.0) is None


def test_a_probe_whose_client_leaves_makes_room_for_another() -> None:
    breaker = opened()
    probe = object()
    breaker.begin(probe, 1.0)

    breaker.end(probe)

    assert breaker.obstacle(1.0) is None


def test_requests_from_before_it_opened_say_nothing_about_the_probe() -> None:
    breaker = CircuitBreaker(RULES)
    old, probe = object(), object()
    breaker.begin(old, 0.0)
    for _ in range(3):
        fail(breaker, 0.0)
    breaker.begin(probe, 1.0)

    breaker.fail(old, 1.0)
    assert not breaker.answer(old)

    assert breaker.answer(probe)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "answer", "succeed", "fail", "end"]),
            st.integers(0, 3),
            st.floats(0.0, 10.0),
        ),
        max_size=60,
    )
)
def test_whatever_happens_the_mark_always_clears(history: list[tuple[str, int, float]]) -> None:
    """When all requests have ended, and the longest opening is over, one more may be sent; and
    its answer closes the breaker."""
    breaker = CircuitBreaker(RULES)
    attempts = [object() for _ in range(4)]
    now_s = 0.0
    for what, number, pause_s in history:
        now_s += pause_s
        attempt = attempts[number]
        match what:
            case "begin":
                breaker.begin(attempt, now_s)
            case "answer":
                breaker.answer(attempt)
            case "succeed":
                breaker.succeed()
            case "fail":
                breaker.fail(attempt, now_s)
            case "end":
                breaker.end(attempt)
    for attempt in attempts:
        breaker.end(attempt)
    now_s += RULES.max_open_s

    assert breaker.obstacle(now_s) is None
    succeed(breaker, now_s)
    assert breaker.obstacle(now_s) is None


def test_a_node_that_never_was_away_is_not_bounded() -> None:
    assert SlowStart(10.0).max_requests(0.0, capacity=64) is None


@pytest.mark.parametrize(
    ("after_s", "expected"),
    [(0.0, 6), (1.0, 6), (5.0, 32), (9.99, 63), (10.0, None), (1000.0, None)],
)
def test_what_a_node_gets_after_it_came_back_grows_with_time(
    after_s: float, expected: int | None
) -> None:
    """A tenth of 64 at first, half of it after half of 10 s, then everything."""
    slow_start = SlowStart(10.0)
    slow_start.begin(100.0)

    assert slow_start.max_requests(100.0 + after_s, capacity=64) == expected


def test_a_small_node_gets_at_least_one_request() -> None:
    slow_start = SlowStart(10.0)
    slow_start.begin(0.0)

    assert slow_start.max_requests(0.0, capacity=1) == 1


def test_without_a_slow_start_a_node_gets_everything_at_once() -> None:
    slow_start = SlowStart(0.0)
    slow_start.begin(0.0)

    assert slow_start.max_requests(0.0, capacity=64) is None
