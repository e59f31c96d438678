"""Limits in virtual time: no clock is read, so every figure is exact."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import Refused, TooManyRequests
from router.rate_limits import (
    CONCURRENCY_RETRY_S,
    ClientLimiter,
    Demand,
    Limits,
    Rate,
    RateBucket,
    duration,
)


def one(max_output_tokens: int = 0, *, num_prompt_tokens: int = 0) -> Demand:
    return Demand(num_prompt_tokens, max_output_tokens, num_sequences=1)


@pytest.mark.parametrize(
    ("per_s", "burst", "num_per_pass"),
    [
        # A bucket of 1 loses the time from when it is full until the next request.
        (1.0, 1, 300),
        (0.2, 2, 20),
        (7.3, 10, 20),
        (100.0, 2, 20),
        (100.0, 250, 20),
    ],
)
def test_whoever_always_asks_gets_the_rate_within_one_per_cent(
    per_s: float, burst: int, num_per_pass: int
) -> None:
    """In the time of 1,000 at the rate, `burst + 1000` pass; more come, irregularly."""
    draw = random.Random(burst)
    limiter = ClientLimiter("acme", Limits(requests=Rate(per_s, burst)))
    start_s = now_s = 1e6
    num_passed = 0
    while now_s <= start_s + 1000 / per_s:
        try:
            limiter.take_request(now_s)
            num_passed += 1
        except TooManyRequests:
            pass
        now_s += draw.expovariate(per_s * num_per_pass)

    assert num_passed == pytest.approx(burst + 1000, rel=0.01)


@pytest.mark.parametrize(("per_min", "burst"), [(60_000.0, 1000), (600.0, 600), (90.0, 25)])
def test_whoever_always_asks_gets_its_tokens_a_minute_within_one_per_cent(
    per_min: float, burst: int
) -> None:
    """Requests of 5 + 20 tokens use 5 + 10. In the time of 10,000 tokens `burst + 10000` are used,
    but for the 25 that the last one would have needed."""
    limiter = ClientLimiter("acme", Limits(tokens=Rate(per_min / 60, burst)))
    now_s, num_used = 0.0, 0
    while now_s <= 10_000 / (per_min / 60):
        try:
            limiter.reserve(one(20, num_prompt_tokens=5), now_s).close(num_used_tokens=15)
            num_used += 15
        except TooManyRequests as refusal:
            now_s += refusal.retry_after_s

    assert num_used == pytest.approx(burst + 10_000, rel=0.01)


def test_whoever_obeys_retry_after_gets_exactly_the_rate() -> None:
    """10 a second: the first burst of 5 at 0 s, then one each 100 ms."""
    limiter = ClientLimiter("acme", Limits(requests=Rate(10.0, 5)))
    now_s = 0.0
    passed_s: list[float] = []
    while len(passed_s) < 1000:
        try:
            limiter.take_request(now_s)
            passed_s.append(now_s)
        except TooManyRequests as refusal:
            now_s += refusal.retry_after_s

    assert passed_s[:5] == [0.0] * 5
    assert passed_s[5:] == pytest.approx([(n + 1) / 10 for n in range(995)])


@settings(max_examples=100, deadline=None)
@given(
    per_s=st.floats(0.1, 1000),
    burst=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 50), st.integers(0, 50)), max_size=60),
)
def test_no_stretch_of_time_uses_more_than_its_share(
    per_s: float, burst: int, steps: list[tuple[float, int, int]]
) -> None:
    """Of every two moments, what was used between them is at most `burst + rate * T`.

    A request asks for its most, and gives back at the next step what it did not use.
    """
    limiter = ClientLimiter("acme", Limits(tokens=Rate(per_s, burst)))
    now_s, used = 0.0, []
    for pause_s, most, spare in steps:
        now_s += pause_s
        try:
            reservation = limiter.reserve(one(most), now_s)
        except Refused:
            continue
        num_used = max(0, most - spare)
        reservation.close(num_used_tokens=num_used)
        used.append((now_s, num_used))

    for first, (start_s, _) in enumerate(used):
        total = 0
        for end_s, num_used in used[first:]:
            total += num_used
            assert total <= burst + per_s * (end_s - start_s) + 0.01


@settings(max_examples=100, deadline=None)
@given(per_s=st.floats(0.01, 1000), amounts=st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_the_time_to_wait_is_neither_too_long_nor_too_short(
    per_s: float, amounts: list[int]
) -> None:
    bucket = RateBucket(Rate(per_s, 20))
    now_s = 0.0
    for amount in amounts:
        wait_s = bucket.wait_s(amount, now_s)
        assert bucket.wait_s(amount, now_s + wait_s) == 0
        if wait_s > 0.01:
            assert bucket.wait_s(amount, now_s + wait_s - 0.001) > 0
        now_s += wait_s
        bucket.take(amount, now_s)


def test_a_refusal_says_what_the_limit_is_and_takes_nothing() -> None:
    limiter = ClientLimiter("acme", Limits(requests=Rate(0.5, 1)))
    limiter.take_request(0.0)

    for _ in range(3):
        with pytest.raises(
            TooManyRequests, match=r"acme.*0\.5 requests a second.*again in 1\.5s"
        ) as no:
            limiter.take_request(0.5)

    assert no.value.kind == "requests"
    assert no.value.headers() == {"retry-after": "2", "retry-after-ms": "1500"}
    limiter.take_request(2.0)


def test_tokens_are_those_of_the_prompt_and_of_the_longest_answer() -> None:
    """Of 100 tokens, 10 + 50 are taken; 41 more are not there, 40 are."""
    limiter = ClientLimiter("acme", Limits(tokens=Rate(1.0, 100)))
    limiter.reserve(one(50, num_prompt_tokens=10), 0.0)

    with pytest.raises(TooManyRequests, match=r"41 tokens, 1 of prompt and 40.*40 left") as refusal:
        limiter.reserve(one(40, num_prompt_tokens=1), 0.0)

    assert refusal.value.kind == "tokens"
    assert refusal.value.retry_after_s == pytest.approx(1.0)
    limiter.reserve(one(40), 0.0)


def test_what_an_answer_did_not_use_is_free_again() -> None:
    """Of 100 tokens, 10 + 80 are taken; the answer has 5, so 85 are free."""
    limiter = ClientLimiter("acme", Limits(tokens=Rate(1.0, 100)))
    reservation = limiter.reserve(one(80, num_prompt_tokens=10), 0.0)

    reservation.close(num_used_tokens=15)

    assert dict(limiter.headers(0.0))["x-ratelimit-remaining-tokens"] == "85"


def test_a_request_that_will_never_fit_is_not_told_to_come_again() -> None:
    limiter = ClientLimiter("acme", Limits(tokens=Rate(1.0, 100), max_concurrent_sequences=2))

    with pytest.raises(Refused, match=r"101 tokens.*100 at once.*smaller max_tokens") as tokens:
        limiter.reserve(one(101), 0.0)
    with pytest.raises(Refused, match=r"3 answers.*acme.*2 made at a time") as sequences:
        limiter.reserve(Demand(1, 1, num_sequences=3), 0.0)

    assert (tokens.value.status, tokens.value.field) == (400, "max_tokens")
    assert (sequences.value.status, sequences.value.field) == (400, "n")


def test_answers_at_the_same_time_are_bounded() -> None:
    limiter = ClientLimiter("acme", Limits(max_concurrent_sequences=3))
    first = limiter.reserve(Demand(1, 1, num_sequences=2), 0.0)

    with pytest.raises(TooManyRequests, match="3 made at a time and 2 are") as refusal:
        limiter.reserve(Demand(1, 1, num_sequences=2), 0.0)
    first.close(num_used_tokens=2)
    limiter.reserve(Demand(1, 1, num_sequences=3), 0.0)

    assert refusal.value.kind == "sequences"
    assert refusal.value.retry_after_s == CONCURRENCY_RETRY_S


def test_a_refusal_by_one_limit_takes_nothing_from_the_others() -> None:
    limiter = ClientLimiter("acme", Limits(tokens=Rate(1.0, 100), max_concurrent_sequences=1))
    running = limiter.reserve(one(60), 0.0)
    with pytest.raises(TooManyRequests):
        limiter.reserve(one(10), 0.0)  # by the answers at the same time
    running.close(num_used_tokens=60)

    with pytest.raises(TooManyRequests):
        limiter.reserve(one(50), 0.0)  # by the tokens
    limiter.reserve(one(40), 0.0)


def test_other_limits_go_on_from_what_is_used() -> None:
    """Of 10, 8 are taken: of 20 then 12 are left, of 4 none, and none for 4 more seconds."""
    limiter = ClientLimiter("acme", Limits(requests=Rate(1.0, 10), max_concurrent_sequences=5))
    for _ in range(8):
        limiter.take_request(0.0)
    running = limiter.reserve(Demand(0, 0, num_sequences=4), 0.0)

    limiter.set_limits(Limits(requests=Rate(1.0, 20), max_concurrent_sequences=4), 0.0)
    assert dict(limiter.headers(0.0))["x-ratelimit-remaining-requests"] == "12"
    with pytest.raises(TooManyRequests):
        limiter.reserve(one(), 0.0)

    limiter.set_limits(Limits(requests=Rate(1.0, 4)), 0.0)
    with pytest.raises(TooManyRequests) as refusal:
        limiter.take_request(0.0)
    assert refusal.value.retry_after_s == pytest.approx(5.0)
    limiter.reserve(one(), 0.0)
    running.close(num_used_tokens=0)


def test_a_limit_that_is_lifted_and_set_again_goes_on_from_what_is_used() -> None:
    limiter = ClientLimiter("acme", Limits(tokens=Rate(1.0, 100)))
    running = limiter.reserve(one(100), 0.0)
    limiter.set_limits(Limits(), 0.0)
    unlimited = limiter.reserve(one(1000), 0.0)
    limiter.set_limits(Limits(tokens=Rate(1.0, 100)), 0.0)
    with pytest.raises(TooManyRequests):
        limiter.reserve(one(1), 0.0)

    running.close(num_used_tokens=40)
    unlimited.close(num_used_tokens=0)

    assert dict(limiter.headers(0.0))["x-ratelimit-remaining-tokens"] == "60"


def test_without_limits_there_are_no_headers() -> None:
    limiter = ClientLimiter("acme", Limits())
    limiter.take_request(0.0)
    limiter.reserve(Demand(10**9, 10**9, num_sequences=10**6), 0.0)

    assert dict(limiter.headers(0.0)) == {}


def test_headers_say_limit_rest_and_time_until_full() -> None:
    """2 of 10 requests taken at 4 a second: full in 0.5 s. 90 of 600 tokens at 1 a second."""
    limiter = ClientLimiter("acme", Limits(Rate(4.0, 10), Rate(1.0, 600)))
    limiter.take_request(0.0)
    limiter.take_request(0.0)
    limiter.reserve(one(90), 0.0)

    assert dict(limiter.headers(0.0)) == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "8",
        "x-ratelimit-reset-requests": "500ms",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "510",
        "x-ratelimit-reset-tokens": "1m30s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.0001, "1ms"),
        (0.25, "250ms"),
        (0.9991, "1s"),
        (7.5, "7.5s"),
        (60.0, "1m0s"),
        (90.25, "1m30.25s"),
        (3600.0, "1h0m0s"),
        (7325.0, "2h2m5s"),
    ],
)
def test_times_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
